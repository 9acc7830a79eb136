#!/usr/bin/env bash
# Everything that only a GPU can show, in one report.
#
#   docs/bench/gpu-check.sh pack            where Rust is: builds and packs target/gpu-check.tar.xz
#   docs/bench/gpu-check.sh run OUT PART…   where a GPU is: writes OUT/report.md and what it is made of
#
# The machine with the GPU needs no Rust and no network: a driver, bash, python3 (with torch for
# `torch` and `errors`), this checkout with the packed file, and NVRTC, cuBLAS and compute-sanitizer
# wherever they are installed or in Python's packages. Without PART all parts run; one that fails
# stops no other. Parts that are run later into the same OUT are added to its report. PROFILE=dev
# packs a quick build, for trying this script.
set -uo pipefail

here=$(realpath "$0")
root=$(realpath "$(dirname "$here")/../..")
archive=target/gpu-check.tar.xz

# Longest that a part may take, in seconds.
declare -A LIMITS=(
    [doctor]=60 [kernels]=240 [golden]=120 [bench]=240 [torch]=240 [bench_fp8]=240
    [nccl]=60 [errors]=120 [cluster]=240 [memcheck]=280 [racecheck]=280
)
PARTS=(doctor kernels golden bench torch bench_fp8 nccl errors cluster memcheck racecheck)

# Longest that one test may take under a sanitizer.
TEST_LIMIT=${TEST_LIMIT:-200}

pack() {
    cd "$root" || exit 1
    local profile=${PROFILE:-release} folder
    folder=$(mktemp -d)
    cargo build --profile "$profile" --package entente || exit 1
    local built=target/${profile/dev/debug}
    cp "$built/entente" "$folder"
    # The test executables by the names of their targets.
    cargo test --profile "$profile" --no-run --message-format json \
        --package entente-model --package entente-coordinator --package entente-tests \
        --lib --test engine --test gpus --test gpu_coordinators |
        python3 -c '
import json, shutil, sys
for line in sys.stdin:
    made = json.loads(line)
    if made["reason"] == "compiler-artifact" and made["profile"]["test"] and made["executable"]:
        shutil.copy(made["executable"], sys.argv[1] + "/" + made["target"]["name"])
' "$folder" || exit 1
    rm -f "$folder"/entente_{coordinator,tests}
    strip "$folder"/*
    # Tests look for their data where they were built.
    echo "$root" >"$folder/root"
    tar -cJf "$archive" -C "$folder" . && ls -l "$archive"
    rm -r "$folder"
}

# Folders with CUDA's libraries: those of Python's packages, which belong together, come first.
library_folders() {
    python3 -c '
import glob, sys
folders = [path for base in sys.path for path in glob.glob(base + "/nvidia/*/lib")]
folders += glob.glob("/usr/local/cuda/lib64") + glob.glob("/usr/local/nvidia/lib*")
print(":".join(folders))'
}

run() {
    cd "$root" || exit 1
    mkdir -p "$1" || exit 1
    OUT=$(realpath "$1")
    shift
    TOOLS=$(mktemp -d)
    trap 'rm -r "$TOOLS"' EXIT
    tar -xJf "$archive" -C "$TOOLS" || python3 -m tarfile -e "$archive" "$TOOLS" || exit 1
    local built_at part result failed=0
    built_at=$(cat "$TOOLS/root")
    [ -e "$built_at" ] || { mkdir -p "$(dirname "$built_at")" && ln -s "$root" "$built_at"; }
    export OUT TOOLS TEST_LIMIT ENTENTE_TEST_CUDA=device ENTENTE_BIN=$TOOLS/entente
    export XDG_CACHE_HOME=$TOOLS TORCH_LIBRARY_PATH=${LD_LIBRARY_PATH:-}
    LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$(library_folders)
    export LD_LIBRARY_PATH
    [ $# -gt 0 ] || set -- "${PARTS[@]}"
    for part in "$@"; do
        echo "== $part"
        SECONDS=0
        # A process group of its own, so that nothing is left of one that takes too long.
        timeout --kill-after 10 "${LIMITS[$part]:-60}" "$here" part "$part" >"$TOOLS/log" 2>&1
        result=$?
        case $result in 0) result=pass ;; 124 | 137) result="too long" ;; *) result=FAIL ;; esac
        [ "$result" = pass ] || failed=1
        echo "== $part: $result after $SECONDS s"
        tail -n 15 "$TOOLS/log"
        { echo "== $part: $result after $SECONDS s"; cat "$TOOLS/log"; } >>"$OUT/log.txt"
        echo "| $part | $result | $SECONDS |" >>"$OUT/parts.md"
        touch "$OUT/sections.md"
        {
            printf '# What a GPU showed\n\n| part | result | s |\n|---|---|---|\n'
            cat "$OUT/parts.md" "$OUT/sections.md"
        } >"$OUT/report.md"
    done
    exit $failed
}

# Adds a section to the report.
section() {
    { printf '\n## %s\n\n' "$1"; cat; } >>"$OUT/sections.md"
}

# Each test of an executable that a filter of the test harness names, so many at a time, in a process
# of its own: a kernel that fails loses the device for all of its process. What follows runs it.
each_test() {
    local program=$1 filter=$2 together=$3
    shift 3
    local names
    # shellcheck disable=SC2086
    mapfile -t names < <("$program" --list --format terse $filter | sed -n 's/: test$//p')
    [ ${#names[@]} -gt 0 ] || { echo "no test of $filter in $program"; return 1; }
    printf '%s\n' "${names[@]}" |
        xargs -P "$together" -I NAME "$here" one NAME "$@" "$program" --exact NAME
}

one() {
    local name=$1 text result=PASS
    shift
    text=$(timeout "$TEST_LIMIT" "$@" 2>&1) || result="FAIL ($?)"
    [ "$result" != PASS ] || text=
    echo "$result $name, $SECONDS s${text:+
$text}"
    [ "$result" = PASS ]
}

part_doctor() {
    nvidia-smi
    "$ENTENTE_BIN" doctor gpu -o json >"$OUT/doctor.json" || return 1
    "$ENTENTE_BIN" doctor gpu | sed 's/^/    /' | section Machine
    python3 -c 'import json, sys; sys.exit(not json.load(open(sys.argv[1]))["devices"])' "$OUT/doctor.json"
}

# Tests that plant faults need the emulated device, those that count free bytes a device of their own,
# those of NCCL two of them.
SHARED="kernels::tests::cuda --skip faults --skip memory --skip nccl"

part_kernels() {
    each_test "$TOOLS/entente_model" "$SHARED" 4
    local shared=$?
    each_test "$TOOLS/entente_model" kernels::tests::cuda::memory 1 && return $shared
}

part_golden() { each_test "$TOOLS/engine" device:: 2; }

part_nccl() { each_test "$TOOLS/entente_model" nccl::a_communicator_of_one_rank 1; }

part_cluster() {
    each_test "$TOOLS/gpus" a_killed_gpu_node 1 &&
        each_test "$TOOLS/gpus" processors_take_over 1 &&
        each_test "$TOOLS/gpu_coordinators" answers_like_one_on_a_processor 1
}

part_bench() { every_kernel bf16 "$OUT/ours.json"; }

part_bench_fp8() { every_kernel fp8 "$OUT/ours-fp8.json"; }

every_kernel() {
    "$ENTENTE_BIN" bench kernels --device cuda:0 --weights "$1" -o json >"$2" || return 1
    python3 -c '
import json, sys
found = json.load(open(sys.argv[1]))
print({name: value for name, value in found.items() if name != "kernels"}, end="\n\n")
columns = ["kernel", "shape", "rows", "experts", "kernels_us", "call_us", "moved_gb_s",
           "share_of_copy", "multiply_tflop_s", "share_of_cublas", "cublas_tflop_s"]
print("|", " | ".join(columns), "|")
print("|" + "---|" * len(columns))
for line in found["kernels"]:
    cells = [line[column] for column in columns]
    cells = [f"{cell:.4g}" if isinstance(cell, float) else cell or "" for cell in cells]
    print("|", " | ".join(map(str, cells)), "|")
' "$2" | section "Every kernel, weights in $1"
}

# TORCH_ARGS="--device cpu --tiny" tries it without a GPU.
part_torch() {
    local beside=()
    [ ! -s "$OUT/ours.json" ] || beside=(--beside "$OUT/ours.json")
    # shellcheck disable=SC2086
    LD_LIBRARY_PATH=$TORCH_LIBRARY_PATH python3 docs/bench/experts_torch.py ${TORCH_ARGS:-} \
        "${beside[@]}" >"$OUT/torch.json" 2>"$TOOLS/torch"
    local result=$?
    cat "$TOOLS/torch"
    grep '^|' "$TOOLS/torch" | section "PyTorch beside it"
    return $result
}

# A node that must not start: its exit code and a sentence.
refused() {
    local sentence=$1 text code
    shift
    text=$("$@" 2>&1)
    code=$?
    echo "exit code $code: $text"
    [ $code = 9 ] && grep -q "error: .*$sentence" <<<"$text"
}

part_errors() {
    cat >"$TOOLS/node.toml" <<END
name = "fr-expert-1"
region = "fr"
listen = "127.0.0.1:0"
model = "$root/tests/golden/mixtral"
weights = "bf16"

[cluster]
name = "local"
nodes = [{ name = "fr-expert-1", region = "fr", address = "127.0.0.1:7100" }]
END
    local node=("$ENTENTE_BIN" expert-node --config "$TOOLS/node.toml" --device) failed=0
    refused "the device is not available: there is no cuda:64" "${node[@]}" cuda:64 || failed=1
    # Somebody else has all memory of the device but what a context takes.
    LD_LIBRARY_PATH=$TORCH_LIBRARY_PATH python3 -c '
import sys, time, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(free - (64 << 20), dtype=torch.uint8, device="cuda")
open(sys.argv[1], "w").close()
time.sleep(100)' "$TOOLS/held" &
    local holder=$!
    while [ ! -e "$TOOLS/held" ] && kill -0 $holder 2>/dev/null; do sleep 0.2; done
    [ -e "$TOOLS/held" ] && refused "out of device memory" timeout 60 "${node[@]}" cuda:0 || failed=1
    kill $holder 2>/dev/null
    wait $holder 2>/dev/null
    return $failed
}

sanitize() {
    local sanitizer
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer) || return 1
    each_test "$TOOLS/entente_model" "$SHARED" 4 "$sanitizer" --tool "$1" --error-exitcode 9
}

part_memcheck() { sanitize memcheck; }

part_racecheck() { sanitize racecheck; }

case ${1:-} in
    pack) pack ;;
    run) [ $# -gt 1 ] || { sed -n '2,12p' "$here"; exit 2; }; shift; run "$@" ;;
    part) "part_$2" ;;
    one) shift; one "$@" ;;
    *) sed -n '2,12p' "$here"; exit 2 ;;
esac
