#!/usr/bin/env bash
# Tests and measures the working tree on a machine with a GPU.
#
#   scripts/gpu.sh [build] [test] [sanitize] [bench] [all]      (default: all)
#
#   build      installs jax_fp8 into a folder of its own; the other steps do so first
#   test       the tests marked gpu, none of them skipped for want of a GPU
#   sanitize   compute-sanitizer's four tools over tests/sanitize.py
#   bench      the benchmarks
#
# Python must have jax with its CUDA plugin, what pyproject.toml's `test` and `bench` extras name,
# and to build: scikit-build-core, nanobind, cmake, ninja, and nvcc in any of the places that
# CMakeLists.txt looks in. Nothing is downloaded, and only build/gpu and OUT are written to.
#
#   OUT             where logs and results go                        (./out)
#   PYTHON          the Python to use                                (python3)
#   JAX_FP8_ARCHS   GPUs to compile for, as CMAKE_CUDA_ARCHITECTURES (90-real)
#   JAX_FP8_WHEEL   install this wheel, or one from this folder, instead of building
#   PYTEST_ARGS     more arguments for pytest
#   COMPUTE_SANITIZER                                                (compute-sanitizer)
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD

python=${PYTHON:-python3}
out=${OUT:-$root/out}
site=$root/build/gpu/site
mkdir -p "$out" build/gpu
out=$(cd "$out" && pwd)

run_build() {
  rm -rf "$site"
  local install=("$python" -m pip install --quiet --no-index --no-deps --target "$site")
  if [ -d "${JAX_FP8_WHEEL:-}" ]; then
    "${install[@]}" --find-links "$JAX_FP8_WHEEL" jax-fp8
  elif [ -n "${JAX_FP8_WHEEL:-}" ]; then
    "${install[@]}" "$JAX_FP8_WHEEL"
  else
    "${install[@]}" --no-build-isolation --config-settings 'build-dir=build/gpu/{wheel_tag}' \
      --config-settings "cmake.define.CMAKE_CUDA_ARCHITECTURES=${JAX_FP8_ARCHS:-90-real}" .
  fi
}

# The working tree's jax_fp8 has no extension and must not be found before the installed one:
# hence -P where `python -m` would put the working tree first.
installed() { env PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" "$@"; }

run_test() {
  # shellcheck disable=SC2086
  installed JAX_FP8_REQUIRE_GPU=1 "$python" -P -m pytest -m gpu ${PYTEST_ARGS:-} 2>&1 \
    | tee "$out/pytest-gpu.log"
}

run_sanitize() {
  local tool what options status=0
  : >"$out/sanitize.log"
  for tool in memcheck racecheck initcheck synccheck; do
    # initcheck does not see what the copy engine writes, which is how the Hopper kernels of decode and
    # of fused_matmul's many rows store 16-bit results: the copies of those to the host are left out,
    # and so are chains of many rows, where another kernel reads them.
    # cublasLt apart: over its kernels the compute-sanitizer of CUDA 13.0 crashes more often than not,
    # and more often where they run in captured graphs, so XLA makes none here.
    for what in quantize cast_transpose fused fused_matmul many_rows small_m decode naive cublaslt; do
      # Where there are no such barriers, their table would only take the memory.
      options=()
      case $tool-$what in
        racecheck-small_m | racecheck-decode | racecheck-cublaslt | \
          synccheck-small_m | synccheck-decode | synccheck-cublaslt | synccheck-fused_matmul | \
          synccheck-many_rows)
          options=(--num-cuda-barriers 20000) ;;
        initcheck-many_rows) continue ;;
        initcheck-decode | initcheck-fused_matmul) options=(--check-api-memory-access no) ;;
      esac
      # The platform's allocator makes one allocation of each buffer, so that an access beyond a
      # buffer is one that memcheck sees.
      {
        echo "--- $tool: $what ---"
        installed XLA_PYTHON_CLIENT_ALLOCATOR=platform XLA_FLAGS=--xla_gpu_enable_command_buffer= \
          "${COMPUTE_SANITIZER:-compute-sanitizer}" --tool "$tool" "${options[@]}" \
          --error-exitcode 1 "$python" tests/sanitize.py "$what"
      } 2>&1 | tee -a "$out/sanitize.log" || status=1
    done
  done
  return $status
}

run_bench() {
  env PYTHONPATH="$site:$root${PYTHONPATH:+:$PYTHONPATH}" \
    "$python" -P -m benchmarks --out "$out/benchmarks" 2>&1 | tee "$out/benchmarks.log"
}

steps=("${@:-all}")
[ "${steps[*]}" != all ] || steps=(test sanitize bench)
for step in "${steps[@]}"; do
  case $step in
    build | test | sanitize | bench) ;;
    *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2 ;;
  esac
done

run_build
failed=()
for step in "${steps[@]}"; do
  [ "$step" != build ] || continue
  echo "=== $step ==="
  "run_$step" || failed+=("$step")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "gpu.sh: FAILED: ${failed[*]}" >&2
  exit 1
fi
echo "gpu.sh: passed: ${steps[*]}"
