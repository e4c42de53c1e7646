#!/bin/bash
# Measures this project on one GPU of 80 GB, without network, in at most BUDGET seconds (540). In its root:
#
#   bash tests/gpu_check.sh
#   ONLY="sd3 sdxl" OUT=FOLDER bash tests/gpu_check.sh   # only steps whose name contains one of these words
#   DRY=1 bash tests/gpu_check.sh                        # tiny models in place of the large, no haste: for CPUs
#
# No step stops the others, whether it fails or takes too long. $OUT (/tmp/gpu_check) gets their logs and
# table.txt, which is printed at the end.
OUT=${OUT:-/tmp/gpu_check} PYTHON=${PYTHON:-python3} BUDGET=${BUDGET:-540} START=$(date +%s)
RUNS=$OUT/gpu_check_runs
rm -rf "$RUNS"
mkdir -p "$OUT"
: > "$OUT/steps.tsv"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONUNBUFFERED=1 PYTORCH_ALLOC_CONF=expandable_segments:True
CHECK="$PYTHON tests/gpu_check.py"
SD3=sd3-medium SDXL=sdxl COG=cogvideox-2b AD=animatediff WAN=wan2.1-1.3b LORA="--lora-rank 64" LIMIT=""
[ "$DRY" ] && SD3=tiny-sd3 SDXL=tiny-sdxl COG=tiny-cogvideox AD=tiny-animatediff WAN=tiny-cogvideox \
  LORA="--lora-rank 8" LIMIT=600 BUDGET=7200

left() { echo $((BUDGET - 15 - $(date +%s) + START)); }  # 15 seconds for the table

step() {  # name, its most seconds, command
  local name=$1 limit=${LIMIT:-$2} rc begun word wanted
  begun=$(date +%s)
  shift 2
  for word in ${ONLY:-$name}; do [[ $name == *$word* ]] && wanted=1; done
  [ "$wanted" ] || return
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  if [ "$limit" -lt 8 ]; then
    printf '%s\tskipped\t0\n' "$name" >> "$OUT/steps.tsv"
    return
  fi
  timeout -k 5 "$limit" "$@" > "$OUT/$name.log" 2>&1
  rc=$?
  printf '%s\t%s\t%s\n' "$name" "$rc" "$(($(date +%s) - begun))" >> "$OUT/steps.tsv"
  echo "$name: rc $rc, $(($(date +%s) - begun)) s, $(left) s left"
}

profile() {  # script, model, micro-batch, batch
  echo "$CHECK run $1.py --random-weights --profile 2 --model $2 --batch-size ${4:-$3} --micro-batch $3"
}

# The most wanted come first: the clock cuts off the last.
step env 30 $CHECK env
step tiny_cuda 60 $PYTHON adm.py --max-iter 40 --evaluate 32 --sample-every 20 --out "$RUNS/tiny"
step sd3_fakelora_m1 45 $(profile adm $SD3 1) $LORA --fake-lora
step sd3_fakelora_m4 45 $(profile adm $SD3 4) $LORA --fake-lora
step sdxl_fakelora_m1 60 $(profile adm $SDXL 1) $LORA --fake-lora
step sdxl_adm_m4 75 $(profile adm $SDXL 4 8)  # two micro-batches: every network's gradients are there
step sdxl_adp_m4 60 $(profile adp $SDXL 4)
step cogvideox_m1 75 $(profile adm $COG 1)
step cogvideox_fakelora_m1 75 $(profile adm $COG 1) $LORA --fake-lora
step wan_fakelora_m1 90 $(profile adm $WAN 1) $LORA --fake-lora
step sdxl_adp_m4_offload 80 $(profile adp $SDXL 4) --offload
step torchrun 45 $PYTHON -m torch.distributed.run --nproc_per_node 1 adm.py --max-iter 10 --evaluate 0 --out "$RUNS/torchrun"
step sd3_lora_m4 45 $(profile adm $SD3 4) $LORA
step sd3_lora_m4_d_fp32 60 $(profile adm $SD3 4) $LORA --d-precision fp32
step resume 120 $CHECK resume "$RUNS"
step mmdit 45 $CHECK mmdit
step avdm2_m2 75 $(profile avdm2 $AD 2)
step avdm2_video_m2 75 $(profile avdm2 $AD 2) --sdm video
step sdxl_adm_m4_offload 110 $(profile adm $SDXL 4) --offload
step wan_m1 90 $(profile adm $WAN 1)
step sd3_fakelora_m1_compile 200 $(profile adm $SD3 1) $LORA --fake-lora --compile
step margins 60 $CHECK margins "$RUNS"
step syncs 30 $CHECK syncs
step compile 90 $CHECK mmdit compiled
$CHECK table "$OUT" | tee "$OUT/table.txt"
