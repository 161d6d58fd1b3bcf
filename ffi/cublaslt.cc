// How a product becomes GEMMs of cublasLt, and which kernels run around them.
#include "ffi/cublaslt.h"

#include <algorithm>

#include "ffi/cublaslt_library.h"
#include "ffi/cublaslt_plan.h"
#include "ffi/cublaslt_timing.h"
#include "ffi/epilogue.h"
#include "ffi/naive.h"
#include "ffi/zero.h"

namespace jax_fp8::lt {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

int64_t align_up(int64_t value, int64_t to) { return ceil_div(value, to) * to; }

struct Route {
  bool raw = false;      // Unscaled float32 sums into the workspace, then the finish kernel.
  bool vectors = false;  // Row scales inside of the GEMM.
  bool blocks = false;   // Block scales inside of the GEMM, raw or not.
  int64_t chunk_b = 1, chunk_m = 1;
  // Parts of the workspace, in bytes from its aligned start.
  int64_t x_scale = 0, w_scale = 0, sums = 0, gemm = 0, gemm_size = 0;
};

// Rows and matrices whose elements 32-bit offsets can count: cublasLt 12.6.2 to 13.1 needs that.
int64_t offset_limit(const Api& api) { return api.GetVersion() < 130200 ? INT32_MAX : INT64_MAX; }

bool is_hopper(const Call& call) { return call.capability >= 90 && call.capability < 100; }

// With block scales M must be a multiple of this.
constexpr int64_t kBlockRows = 4;
// What the workspace may hold of the scales of X, which bounds the rows of one GEMM.
constexpr int64_t kBlockScales = 8 * kMiB;

bool is_16_byte_aligned(const void* pointer) { return alignment_of(pointer) >= 16; }

bool is_tiled(const Operand& operand) { return operand.block_rows == kBlock; }

// Whether W's scales lie otherwise than cublasLt reads block scales.
bool stage_w_blocks(const Operand& w) {
  return !is_tiled(w) || w.scale_cols % 4 != 0 || !is_16_byte_aligned(w.scale);
}

// Why cublasLt cannot multiply these operands, whatever is done around it; empty if it can.
std::string refuse(const Api& api, const Call& call) {
  const Product& p = *call.product;
  if (call.capability < 89) {
    return "the device has compute capability " + std::to_string(call.capability / 10) + "." +
           std::to_string(call.capability % 10) + ", and FP8 tensor cores begin with 8.9";
  }
  if (p.x.wide()) return "cublasLt has no product of 16-bit by FP8 values";
  if (p.x.type == Type::kE5M2 && p.w.type == Type::kE5M2) {
    return "cublasLt has no product of E5M2 with E5M2";
  }
  if (p.blocks() && !is_hopper(call)) {
    return "cublasLt has block scales on compute capability 9.x alone";
  }
  if (p.blocks() && p.m < kBlockRows) return "with block scales M must be at least 4";
  if (p.k % 16 != 0) return "K must be a multiple of 16";
  if (p.n % 4 != 0) return "N must be a multiple of 4";
  if (!is_16_byte_aligned(p.x.data) || !is_16_byte_aligned(p.w.data)) {
    return "an operand does not start at a multiple of 16 bytes";
  }
  if (p.n * p.k > offset_limit(api)) {
    return "w has more elements than cublasLt " + version_string(api.GetVersion()) + " can address";
  }
  return "";
}

bool can_run_directly(const Product& p) {
  const int64_t row_bytes = p.n * byte_width(p.d_type);
  const Type bias_type = p.d_type == Type::kF16 ? Type::kF16 : Type::kBF16;
  const bool bias = p.bias == nullptr || (p.bias_type == bias_type && is_16_byte_aligned(p.bias));
  const bool output = !is_fp8(p.d_type) || (p.x.per_tensor() && p.w.per_tensor() && p.batch == 1 &&
                                            is_16_byte_aligned(p.inverse_out_scale) &&
                                            (p.d_type == Type::kE4M3 || p.x.type != p.w.type));
  const bool shared =
      p.batch == 1 || p.blocks() ||
      (p.x.per_tensor() && p.w.per_tensor() && p.x.scale_batch == 0 && p.w.scale_batch == 0);
  return row_bytes % 16 == 0 && is_16_byte_aligned(p.d) && bias && output && shared;
}

// Scales must start at multiples of 16 bytes and, for vectors, have one for each row.
bool must_stage(const Operand& operand, bool vectors) {
  return !is_16_byte_aligned(operand.scale) || (vectors && operand.per_tensor());
}

// Fills in `route`, or says why there is none.
std::string plan_route(const Api& api, const Call& call, bool raw, Route* route) {
  const Product& p = *call.product;
  const bool rows = !p.x.per_tensor() || !p.w.per_tensor();
  const bool hopper = is_hopper(call);
  route->raw = raw;
  route->blocks = p.blocks();
  route->vectors = !raw && rows && !route->blocks;
  if (!raw && !can_run_directly(p)) return "it needs a second kernel";
  if (route->vectors && !hopper) return "cublasLt has row scales on compute capability 9.x alone";

  const int64_t limit = offset_limit(api);
  const int64_t largest = std::max({p.m * p.k, p.m * p.n, p.n * p.k});
  route->chunk_b = std::clamp<int64_t>(limit / largest, 1, p.batch);
  route->chunk_m = largest <= limit ? p.m : std::min(p.m, limit / std::max(p.k, p.n) / 128 * 128);
  if (route->chunk_m == 0) return "a row has more elements than cublasLt can address";
  if (!raw && is_fp8(p.d_type) && route->chunk_m < p.m) return "its amax would be that of a part";

  int64_t used = 0;
  const auto reserve = [&](int64_t bytes) {
    const int64_t start = used;
    used = align_up(used + bytes, 256);
    return start;
  };
  if (route->blocks) {
    const int64_t k_blocks = ceil_div(p.k, kBlock);
    const int64_t fits = kBlockScales / (4 * k_blocks) / kBlockRows * kBlockRows;
    if (fits == 0) return "the scales of 4 rows do not fit into the workspace";
    route->chunk_b = 1;
    route->chunk_m = std::min(route->chunk_m, fits);
    route->x_scale = reserve(4 * k_blocks * route->chunk_m);
    route->w_scale = reserve(
        4 * (is_tiled(p.w) ? ceil_div(p.n, kBlock) * align_up(k_blocks, 4) : k_blocks * p.n));
  } else if (!raw) {
    if (must_stage(p.x, route->vectors)) {
      route->x_scale = reserve(4 * (route->vectors ? p.m : 1));
    }
    if (must_stage(p.w, route->vectors)) {
      route->w_scale = reserve(4 * (route->vectors ? p.n : 1));
    }
  }
  if (raw) {
    route->gemm_size = (hopper || call.capability >= 100 ? 8 : 4) * kMiB;
    route->gemm = reserve(route->gemm_size);
    route->sums = used;
    const int64_t fits = (call.workspace_size - used) / (4 * p.n);
    const int64_t least = route->blocks ? kBlockRows : 1;
    if (fits < least) return "too few rows of D fit into the workspace";
    route->chunk_m = std::min(route->chunk_m, fits / least * least);
    route->chunk_b = route->chunk_m < p.m ? 1 : std::min(route->chunk_b, fits / p.m);
    return "";
  }
  route->gemm = used;
  route->gemm_size = call.workspace_size - used;
  return route->gemm_size < 0 ? "its scales do not fit into the workspace" : "";
}

Problem make_problem(const Call& call, const Route& route, const Pointers& at, int64_t batch,
                     int64_t m) {
  const Product& p = *call.product;
  Problem key{};
  key.device = call.device;
  key.batch = batch;
  key.m = m;
  key.n = p.n;
  key.k = p.k;
  key.x = p.x.type;
  key.w = p.w.type;
  key.d = route.raw ? Type::kF32 : p.d_type;
  key.has_bias = at.bias != nullptr;
  key.bias = p.bias_type;
  key.activation = route.raw ? Activation::kNone : p.activation;
  key.vectors = route.vectors;
  key.blocks = route.blocks;
  key.tiles = route.blocks && is_tiled(p.w);
  key.scaled = at.x_scale != nullptr;
  key.out_scale = at.out_scale != nullptr;
  key.fast = p.fast;
  key.workspace = route.gemm_size;
  return key;
}

// Calls body(b, count_b, row, rows, pointers) for each GEMM of the route, until it is not done.
template <typename Body>
Result for_each_gemm(const Call& call, const Route& route, Body body) {
  const Product& p = *call.product;
  auto* const workspace = static_cast<uint8_t*>(call.workspace);
  const auto staged = [&](const Operand& operand, int64_t offset) {
    return must_stage(operand, route.vectors) ? reinterpret_cast<float*>(workspace + offset)
                                              : operand.scale;
  };
  for (int64_t b = 0; b < p.batch; b += route.chunk_b) {
    const int64_t count_b = std::min(route.chunk_b, p.batch - b);
    for (int64_t row = 0, rows = 0; row < p.m; row += rows) {
      rows = std::min(route.chunk_m, p.m - row);
      if (route.blocks && rows % kBlockRows != 0) {
        // The last rows with as many before them as are missing, a second time.
        if (rows < kBlockRows) row = p.m - kBlockRows;
        rows = std::max(rows / kBlockRows, int64_t{1}) * kBlockRows;
      }
      Pointers at{};
      at.x = p.x.data + (b * p.m + row) * p.k;
      at.w = p.w.data + b * p.n * p.k;
      if (route.raw) {
        at.d = workspace + route.sums;
      } else {
        at.d = static_cast<uint8_t*>(p.d) + (b * p.m + row) * p.n * byte_width(p.d_type);
        at.x_scale = staged(p.x, route.x_scale) + (route.vectors ? row : 0);
        at.w_scale = staged(p.w, route.w_scale);
        at.bias = p.bias;
        at.out_scale = p.inverse_out_scale;
        at.amax = p.amax;
      }
      if (route.blocks) {
        at.x_scale = reinterpret_cast<float*>(workspace + route.x_scale);
        at.w_scale = stage_w_blocks(p.w) ? reinterpret_cast<float*>(workspace + route.w_scale)
                                         : p.w.scale + p.w.scale_index(b, 0);
      }
      const Result result = body(b, count_b, row, rows, at);
      if (result.outcome != Outcome::kDone) return result;
    }
  }
  return {Outcome::kDone, ""};
}

Result failed(const std::string& reason) { return {Outcome::kFailed, reason}; }
Result from_cuda(cudaError_t error) {
  return error == cudaSuccess ? Result{Outcome::kDone, ""} : failed(cudaGetErrorString(error));
}

// Finds the plan of each GEMM of a route.
Result prepare_route(const Api& api, const Call& call, const Route& route) {
  return for_each_gemm(
      call, route,
      [&](int64_t, int64_t count_b, int64_t, int64_t rows, const Pointers& at) -> Result {
        std::string reason;
        const auto plan = find_plan(api, make_problem(call, route, at, count_b, rows), at,
                                    call.compiling, &reason);
        if (plan == nullptr) return failed(reason);
        if (!refusal(*plan).empty()) return {Outcome::kUnsupported, refusal(*plan)};
        return {Outcome::kDone, ""};
      });
}

// The first route for which cublasLt has algorithms: one call, or raw sums and a second kernel.
Result choose_route(const Api& api, const Call& call, Route* route) {
  std::string reason = refuse(api, call);
  if (!reason.empty()) return {Outcome::kUnsupported, reason};
  for (const bool raw : {false, true}) {
    *route = Route{};
    std::string why_not = plan_route(api, call, raw, route);
    if (why_not.empty()) {
      Result result = prepare_route(api, call, *route);
      if (result.outcome != Outcome::kUnsupported) return result;
      why_not = result.reason;
    }
    reason = why_not;
  }
  return {Outcome::kUnsupported, reason};
}

// Brings the scales of one GEMM into the layouts of cublasLt's block scales.
cudaError_t stage_blocks(const Call& call, const Route& route, int64_t b, int64_t row, int64_t rows,
                         const Pointers& at) {
  const Product& p = *call.product;
  if (!route.blocks) return cudaSuccess;
  cudaError_t error =
      vector_scales(const_cast<float*>(at.x_scale), p.x, p.k, b, row, rows, call.stream);
  if (error != cudaSuccess || row != 0 || !stage_w_blocks(p.w)) return error;
  auto* const target = const_cast<float*>(at.w_scale);
  return is_tiled(p.w) ? tile_scales(target, p.w, b, p.n, call.stream)
                       : vector_scales(target, p.w, p.k, b, 0, p.n, call.stream);
}

Result run_route(const Api& api, const Call& call, const Route& route, Ran* ran) {
  const Product& p = *call.product;
  auto* const workspace = static_cast<uint8_t*>(call.workspace);
  const auto stage = [&](const Operand& operand, int64_t offset, int64_t rows) {
    if (route.raw || route.blocks || !must_stage(operand, route.vectors)) return cudaSuccess;
    return fill_scales(reinterpret_cast<float*>(workspace + offset), operand.scale,
                       operand.per_tensor() ? 0 : 1, route.vectors ? rows : 1, call.stream);
  };
  cudaError_t error = stage(p.x, route.x_scale, p.m);
  if (error == cudaSuccess) error = stage(p.w, route.w_scale, p.n);
  if (error == cudaSuccess && p.amax != nullptr) {
    error = zero_words(p.amax, 1, call.stream);
  }
  if (error != cudaSuccess) return from_cuda(error);
  Result result = for_each_gemm(
      call, route,
      [&](int64_t b, int64_t count_b, int64_t row, int64_t rows, const Pointers& at) -> Result {
        std::string reason;
        const auto plan = find_plan(api, make_problem(call, route, at, count_b, rows), at,
                                    call.compiling, &reason);
        if (plan == nullptr) return failed(reason);
        if (const cudaError_t staged = stage_blocks(call, route, b, row, rows, at);
            staged != cudaSuccess) {
          return from_cuda(staged);
        }
        reason = multiply(api, plan.get(), at, workspace + route.gemm, call.stream);
        if (!reason.empty()) return failed(reason);
        ran->algorithm = algorithm(*plan);
        ran->workspace = lt::workspace(*plan);
        ran->choice = choice(*plan);
        ran->candidates = candidates(*plan);
        if (!route.raw) return {Outcome::kDone, ""};
        return from_cuda(finish_raw(p, static_cast<const float*>(at.d), route.blocks, b, count_b,
                                    row, rows, call.stream));
      });
  if (result.outcome != Outcome::kDone) return result;
  if (route.raw) ran->algorithm += "; float32 sums, finished by a second kernel";
  if (!route.raw && p.amax != nullptr) return from_cuda(repair_infinities(p, call.stream));
  return result;
}

// The call with its workspace aligned by hand: JAX's buffers need not be. What is left is the same
// wherever it starts, for a plan depends on it.
Call align_workspace(Call call) {
  const auto address = reinterpret_cast<uintptr_t>(call.workspace);
  const int64_t skipped =
      align_up(static_cast<int64_t>(address), 256) - static_cast<int64_t>(address);
  call.workspace = static_cast<uint8_t*>(call.workspace) + skipped;
  call.workspace_size = (call.workspace_size - 255) / 256 * 256;
  return call;
}

}  // namespace

Result prepare(const Call& call) {
  std::string error;
  const Api* api = library(&error);
  if (api == nullptr) return failed(error);
  const Call aligned = align_workspace(call);
  Route route;
  return choose_route(*api, aligned, &route);
}

Result run(const Call& call, Ran* ran) {
  std::string error;
  const Api* api = library(&error);
  if (api == nullptr) return failed(error);
  ran->version = version_string(api->GetVersion());
  const RelaxedCapture relaxed;  // A plan or a kernel may be met here for the first time.
  const Call aligned = align_workspace(call);
  Route route;
  const Result chosen = choose_route(*api, aligned, &route);
  if (chosen.outcome != Outcome::kDone) return chosen;
  return run_route(*api, aligned, route, ran);
}

}  // namespace jax_fp8::lt
