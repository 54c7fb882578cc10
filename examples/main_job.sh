#!/usr/bin/env bash
# The main job: a spec becomes a trained model, a GGUF that llama.cpp runs, and a table that proves they agree.
#
#   examples/main_job.sh                                   # the demo
#   SPEC=nano DATA=my_texts/ STEPS=2000 OUT=runs/mine examples/main_job.sh
set -euo pipefail
cd "$(dirname "$0")/.."

SPEC=${SPEC:-tiny}
DATA=${DATA:-stdlib}
STEPS=${STEPS:-600}
QUANT=${QUANT:-q4}
OUT=${OUT:-runs/demo}
PROMPT=${PROMPT:-"def main():"}
gguf=$OUT/$(basename "$OUT").$QUANT.gguf
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)

# Print a command as one would type it, then run it with the right python.
run() {
    local word line=''
    for word in "$@"; do
        case $word in *[!A-Za-z0-9_./:=+-]*) word="'$word'" ;; esac
        line="$line $word"
    done
    printf '\n$%s\n' "$line"
    "$python" "${@:2}"
}

if [ -f "$OUT/training/config.yaml" ]; then # begun earlier: go on, or find that it is done
    run python -m train --out "$OUT" --resume
else
    run python -m train --spec "$SPEC" --data "$DATA" --steps "$STEPS" --out "$OUT"
fi
run python -m convert "$OUT" --to gguf --quant "$QUANT" --out "$gguf" --force
run python -m backends generate "$gguf" --prompt "$PROMPT" --max-tokens 80 --seed 1
run python -m evals "$gguf" --reference "$OUT"

cat <<END

Next:
  .venv/bin/python -m backends generate $gguf --prompt 'import '
  .venv/bin/convert $OUT --to gguf --quant q8 --out $OUT/$(basename "$OUT").q8.gguf
  .venv/bin/python -m train --spec nano --data YOUR_TEXTS/ --out runs/nano
END
