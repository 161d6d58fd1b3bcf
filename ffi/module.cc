// The Python module jax_fp8._src._ffi: hands the handlers to JAX and answers questions.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>
#include <utility>

#include "ffi/checks.h"
#include "ffi/cublaslt_library.h"
#include "ffi/cublaslt_timing.h"
#include "ffi/handlers.h"
#include "ffi/journal.h"
#include "ffi/plan_table.h"

namespace nb = nanobind;

namespace jax_fp8 {
namespace {

nb::dict capsules(const Stages& stages) {
  nb::dict result;
  for (const auto& [stage, handler] : stages) result[stage.c_str()] = nb::capsule(handler);
  return result;
}

nb::dict registrations() {
  nb::dict cast_transpose, fused_matmul, fused_quantize, line_amaxes, quantize, scaled_matmul, all;
  cast_transpose["cpu"] = capsules(cast_transpose_cpu_stages());
  cast_transpose["CUDA"] = capsules(cast_transpose_cuda_stages());
  line_amaxes["cpu"] = capsules(line_amaxes_cpu_stages());
  line_amaxes["CUDA"] = capsules(line_amaxes_cuda_stages());
  fused_matmul["cpu"] = capsules(fused_matmul_cpu_stages());
  fused_matmul["CUDA"] = capsules(fused_matmul_cuda_stages());
  fused_quantize["cpu"] = capsules(fused_quantize_cpu_stages());
  fused_quantize["CUDA"] = capsules(fused_quantize_cuda_stages());
  quantize["cpu"] = capsules(quantize_cpu_stages());
  quantize["CUDA"] = capsules(quantize_cuda_stages());
  scaled_matmul["cpu"] = capsules(scaled_matmul_cpu_stages());
  scaled_matmul["CUDA"] = capsules(scaled_matmul_cuda_stages());
  all["jax_fp8_cast_transpose"] = cast_transpose;
  all["jax_fp8_fused_matmul"] = fused_matmul;
  all["jax_fp8_fused_quantize"] = fused_quantize;
  all["jax_fp8_line_amaxes"] = line_amaxes;
  all["jax_fp8_quantize"] = quantize;
  all["jax_fp8_scaled_matmul"] = scaled_matmul;
  return all;
}

std::string cublaslt_version() {
  std::string error;
  const lt::Api* api = lt::library(&error);
  if (api == nullptr) throw std::runtime_error(error);
  return lt::version_string(api->GetVersion());
}

int compute_capability(int ordinal) {
  int capability = 0;
  const cudaError_t error = device_capability(ordinal, &capability);
  if (error != cudaSuccess) {
    throw std::runtime_error(from_cuda("compute_capability", error).message());
  }
  return capability;
}

nb::list journal_entries() {
  nb::list result;
  for (const auto& [entry, count] : journal()) {
    nb::dict item;
    for (const auto& [name, value] : entry) item[name.c_str()] = nb::cast(value);
    item["when"] = "run";
    item["count"] = count;
    result.append(item);
  }
  return result;
}

// GPU, cublasLt, problem, algorithm, candidates, nanoseconds, origin.
using ChoiceTuple =
    std::tuple<std::string, std::string, std::string, std::string, int64_t, int64_t, std::string>;

std::vector<ChoiceTuple> plan_choices() {
  std::vector<ChoiceTuple> result;
  for (const lt::Choice& c : lt::choices()) {
    result.emplace_back(c.gpu, c.cublaslt, c.problem, c.algorithm, c.candidates, c.ns, c.origin);
  }
  return result;
}

lt::Choice to_choice(const ChoiceTuple& tuple) {
  const auto& [gpu, cublaslt, problem, algorithm, candidates, ns, origin] = tuple;
  return {gpu, cublaslt, problem, algorithm, candidates, ns, origin};
}

void add_plan_choices(const std::vector<ChoiceTuple>& added) {
  std::vector<lt::Choice> choices;
  for (const ChoiceTuple& tuple : added) choices.push_back(to_choice(tuple));
  lt::add_choices(choices);
}

std::string keep_plan_choice(const ChoiceTuple& timed) {
  return lt::keep_choice(to_choice(timed)).algorithm;
}

}  // namespace
}  // namespace jax_fp8

NB_MODULE(_ffi, m) {
  m.attr("VERSION") = JAX_FP8_VERSION;
  m.attr("API_VERSION") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.def("registrations", &jax_fp8::registrations);
  m.def("set_cublaslt_candidates", &jax_fp8::lt::set_candidates);
  m.def("cublaslt_version", &jax_fp8::cublaslt_version);
  m.def("compute_capability", &jax_fp8::compute_capability);
  m.def("journal", &jax_fp8::journal_entries);
  m.def("clear_journal", &jax_fp8::clear_journal);
  m.def("set_plan_choice", &jax_fp8::lt::set_choosing);
  m.def("plan_choices", &jax_fp8::plan_choices);
  m.def("add_plan_choices", &jax_fp8::add_plan_choices);
  m.def("keep_plan_choice", &jax_fp8::keep_plan_choice);
  m.def("clear_plan_choices", &jax_fp8::lt::clear_choices);
  m.def("limit_timing_memory", &jax_fp8::lt::limit_timing_memory);
}
