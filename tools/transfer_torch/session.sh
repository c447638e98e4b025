#!/bin/sh
# One sitting on a GPU machine: align (unless MODEL is given), distil, pack. Run it with setsid and
# nohup, so that it outlives the command that starts it; OUT/session.log says how far it is.
#   BASE=B.gguf HEADS=H.json DATA=D OUT=O [MODEL=FOLDER] [GPUS=1] [ALIGN=4] [DISTIL=15] [DECAY=0]
#   [SEED=1] [ROWS=32] [LENGTH=1024] [TUNING=4,8,4,32] [MORE="--answer 10 ..."] session.sh
# ALIGN and DISTIL are minutes; DECAY the last of DISTIL in which the rate falls, 0 to go on later.
set -eu
mkdir -p "$OUT"
exec >>"$OUT/session.log" 2>&1
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
IN="--base $BASE --heads $HEADS --data $DATA --tuning ${TUNING:-4,8,4,32} --seed ${SEED:-1}"
train() {
    if [ "${GPUS:-1}" -gt 1 ]; then
        torchrun --nproc-per-node "$GPUS" -m tools.transfer_torch.train "$@"
    else
        python3 -m tools.transfer_torch.train "$@"
    fi
}
CUDA_VISIBLE_DEVICES=0 python3 -m tools.transfer_torch.warm --base "$BASE" --heads "$HEADS" \
    --rows "${ROWS:-32}" --length "${LENGTH:-1024}" --tuning "${TUNING:-4,8,4,32}"
if [ -z "${MODEL:-}" ]; then
    # shellcheck disable=SC2086  # lists of options
    train align $IN --out "$OUT/align" --length "${LENGTH:-1024}" --rows "${ROWS:-32}" --lr 1e-3 \
        --minutes "${ALIGN:-4}" --decay-minutes 1 --eval-batches 0
    MODEL="$OUT/align/last"
fi
# shellcheck disable=SC2086
train distil $IN --out "$OUT/distil" --model "$MODEL" --rows "${ROWS:-32}" \
    --length "${LENGTH:-1024}" --lr 4e-4 --warmup 100 --minutes "${DISTIL:-15}" \
    --decay-minutes "${DECAY:-0}" --eval-batches 0 --save-every 1000 ${MORE:---answer 10}
python3 -m tools.transfer_torch.carry pack "$OUT/distil/last" "$OUT/parts" --base "$BASE"
echo DONE
