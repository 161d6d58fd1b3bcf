// The handlers of jax_fp8_fused_matmul: checks and dispatch of one or more products, each of which
// multiplies what the one before has made.
#include "ffi/fused_matmul.h"

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "ffi/checks.h"
#include "ffi/cublaslt.h"
#include "ffi/decode.h"
#include "ffi/fused.h"
#include "ffi/fused_matmul_link.h"
#include "ffi/gemv.h"
#include "ffi/handlers.h"
#include "ffi/journal.h"
#include "ffi/large_m_hopper.h"
#include "ffi/naive.h"
#include "ffi/quantize.h"
#include "ffi/small_m.h"
#include "ffi/small_m_hopper.h"

namespace jax_fp8 {
namespace {

constexpr const char* kName = kFusedMatmul;

// The norm and the quantization of x, as far as they are asked for.
template <typename Normalize, typename Fuse, typename Cast>
cudaError_t prepare(const Product& p, const Link& a, Normalize normalize, Fuse fuse, Cast cast) {
  void* const data = a.multiplied.untyped_data();
  if (!a.quantizes()) {
    return p.norm_weight == nullptr ? cudaSuccess : normalize(p, static_cast<__nv_bfloat16*>(data));
  }
  auto* const scales = static_cast<float*>(a.scales.untyped_data());
  const bool is_static = !absent(a.given);
  const auto* const given = is_static ? static_cast<const float*>(a.given.untyped_data()) : nullptr;
  if (p.norm_weight == nullptr) {
    Quantize q{};
    q.batch = 1, q.rows = p.m, q.cols = p.k;
    q.block_rows = is_static ? 0 : 1;
    q.given = given;
    q.x = p.x.data, q.x_type = Type::kBF16;
    q.data = static_cast<uint8_t*>(data), q.data_type = Type::kE4M3;
    q.scale = scales;
    q.follows = a.follows;
    return cast(q);
  }
  Fused f{};
  f.producer = Producer::kRmsNorm;
  f.batch = 1, f.rows = p.m, f.cols = p.k;
  f.block_rows = is_static ? 0 : 1;
  f.given = given;
  f.x = p.x.data, f.x_type = Type::kBF16;
  f.weight = p.norm_weight, f.weight_type = Type::kBF16;
  f.eps = p.eps;
  f.data = static_cast<uint8_t*>(data), f.data_type = Type::kE4M3;
  f.scale = scales;
  f.follows = a.follows;
  return fuse(f);
}

cudaError_t prepare_on_host(const Product& p, const Link& a) {
  const auto done = [](auto function) {
    return [function](auto&&... arguments) {
      function(arguments...);
      return cudaSuccess;
    };
  };
  return prepare(p, a, done(normalize_host), done(fused_host), done(quantize_host));
}

cudaError_t prepare_on_device(const Product& p, const Link& a, cudaStream_t stream) {
  const auto on_stream = [stream](auto function) {
    return [function, stream](auto&&... arguments) { return function(arguments..., stream); };
  };
  return prepare(p, a, on_stream(normalize_device), on_stream(fused_device),
                 on_stream(quantize_device));
}

// Why neither small_m_hopper nor large_m_hopper can compute all of it behind a quantization; empty
// if one can.
std::string refusal_quantized(const Product& p, const Link& a, int capability) {
  if (a.has_many_rows()) {
    if (large_m_hopper_supports(p, capability)) return "";
    return "quantized, with many rows, it takes K in steps of 16, columns in steps of 8 and arrays "
           "that start at multiples of 16 bytes, with compute capability 9.0";
  }
  const std::string reason = small_m_refusal(p, capability);
  if (!reason.empty() || small_m_hopper_supports(p, capability)) return reason;
  return "quantized, it takes M <= 16, with compute capability 9.0";
}

// Why gemv cannot compute all of it in one; empty if it can.
std::string refusal(const Product& p, int capability) {
  std::string reason = small_m_refusal(p, capability);
  if (reason.empty() && p.m > kGemvM) reason = join("it takes M <= ", kGemvM);
  if (reason.empty() && p.norm_weight != nullptr && !gemv_takes_norm(p)) {
    reason = "x and the norm's weight are too large to stay in shared memory";
  }
  if (reason.empty() && reinterpret_cast<uintptr_t>(p.norm_weight) % 16 != 0) {
    reason = "the norm's weight does not start at a multiple of 16 bytes";
  }
  return reason;
}

void note_fused(const Product& p, const Link& a, const char* platform, const char* implementation,
                const std::string& algorithm = "", bool is_prepared = false) {
  const char* const quantize = a.quantizes() && !is_prepared ? "quantize, " : "";
  Entry entry = {{"operation", "fused_matmul"},
                 {"implementation", implementation},
                 {"platform", platform},
                 {"shape", std::vector<int64_t>{1, p.m, p.n, p.k}},
                 {"dtypes", std::vector<std::string>{type_name(p.x.type), type_name(p.w.type),
                                                     type_name(p.d_type)}},
                 {"granularity", granularity_name(p.w.block_rows, p.w.block_cols)},
                 {"parts", join(p.norm_weight != nullptr ? "norm, " : "", quantize, "product",
                                p.bias != nullptr ? ", bias" : "", p.swiglu ? ", swiglu" : "",
                                p.residual != nullptr ? ", residual" : "")}};
  if (!algorithm.empty()) entry["algorithm"] = algorithm;
  note(std::move(entry));
}

xffi::Error run_on_cpu(const Link& a, const Product& p) {
  note_fused(p, a, "cpu", "naive");
  const ScopedSubnormals subnormals;
  prepare_on_host(p, a);
  const Product product = product_of(p, a);
  naive_host(product);
  if (a.sums.element_count() != 0) finish_host(p, product.d, product.d_type);
  return xffi::Error::Success();
}

// Where the handler runs, and what it runs with.
struct Context {
  std::string_view implementation;
  int capability, ordinal;
  xffi::AnyBuffer workspace;
  cudaStream_t stream;
};

xffi::Error run_steps(const Product& fused, const Link& a, const Context& on, bool is_prepared) {
  const Product p = product_of(fused, a);
  bool is_done = false;
  lt::Ran ran;
  if (a.has_many_rows() && on.capability >= 89) {
    const auto size = static_cast<int64_t>(on.workspace.element_count());
    const lt::Result result = lt::run(
        {&p, on.capability, on.ordinal, on.workspace.untyped_data(), size, on.stream}, &ran);
    if (result.outcome == lt::Outcome::kFailed) {
      return xffi::Error(xffi::ErrorCode::kInternal, join(kName, ": ", result.reason));
    }
    is_done = result.outcome == lt::Outcome::kDone;
  }
  if (!is_done) {
    const bool decodes = decode_refusal(p, on.capability).empty();
    const cudaError_t error = decodes ? decode_matmul(p, on.stream) : naive_device(p, on.stream);
    if (error != cudaSuccess) return from_cuda(kName, error);
  }
  note_fused(fused, a, "cuda", "steps", ran.algorithm, is_prepared);
  if (a.sums.element_count() == 0) return xffi::Error::Success();
  return from_cuda(kName, finish_device(fused, p.d, p.d_type, on.stream));
}

// `next` is the link behind it, or null. Sets whether its codes were written, and reads whether
// this one's were.
xffi::Error run_on_cuda(const Link& a, const Product& p, const Link* next, const Context& on,
                        bool* has_codes) {
  const bool is_prepared = std::exchange(*has_codes, false);
  if (p.m * p.n == 0) return xffi::Error::Success();
  Product after = prepared(p, a);
  const std::string reason =
      a.quantizes() ? refusal_quantized(after, a, on.capability) : refusal(p, on.capability);
  const bool is_named = on.implementation == "kernel";
  const bool in_one = reason.empty() && (is_named || on.capability / 10 == 9);  // Where measured.
  if (!in_one && is_named) {
    return xffi::Error(xffi::ErrorCode::kUnimplemented,
                       join(kName, ": implementation 'kernel' cannot multiply x ", describe(a.x),
                            " by w ", describe(a.w), ": ", reason));
  }
  if (in_one && !a.quantizes()) {
    note_fused(p, a, "cuda", "gemv");
    return from_cuda(kName, small_m_matmul(p, on.capability, on.stream, a.follows));
  }
  if (in_one && next != nullptr && next->takes_codes()) {
    after.codes = static_cast<uint8_t*>(next->multiplied.untyped_data());
    after.codes_scale = static_cast<const float*>(next->given.untyped_data());
    *has_codes = true;
  }
  // A kernel for the quantization of a row would take longer than each block doing it for itself.
  if (in_one && !is_prepared && !a.has_many_rows() && small_m_hopper_quantizes(p, on.capability)) {
    Product whole = after;
    whole.x = p.x;
    whole.x.scale = absent(a.given) ? nullptr : after.x.scale;
    whole.norm_weight = p.norm_weight;
    note_fused(p, a, "cuda", "small_m", "quantizes x");
    return from_cuda(kName, small_m_hopper(whole, on.stream, a.follows));
  }
  if (!is_prepared) {
    const cudaError_t error = prepare_on_device(p, a, on.stream);
    if (error != cudaSuccess) return from_cuda(kName, error);
  }
  if (!in_one) return run_steps(p, a, on, is_prepared);
  if (!a.has_many_rows()) {
    note_fused(p, a, "cuda", "small_m", "", is_prepared);
    return from_cuda(kName, small_m_hopper(after, on.stream, true));
  }
  note_fused(p, a, "cuda", "large_m", "", is_prepared);
  return from_cuda(kName, large_m_hopper(after, on.stream));
}

// Runs one link after the other, each told which one is behind it. All are checked before, as one
// may write what is another's.
template <typename Run>
xffi::Error run_links(const xffi::ErrorOr<std::vector<Link>>& links, Run run) {
  if (!links.has_value()) return links.error();
  const size_t count = links->size();
  std::vector<Product> products(count);
  for (size_t i = 0; i < count; ++i) {
    if (auto error = make_product((*links)[i], &products[i]); error.failure()) return error;
  }
  for (size_t i = 0; i < count; ++i) {
    const Link* const next = i + 1 < count ? &(*links)[i + 1] : nullptr;
    if (auto error = run((*links)[i], products[i], next); error.failure()) return error;
  }
  return xffi::Error::Success();
}

xffi::Error cpu(xffi::AnyBuffer x, xffi::AnyBuffer x_scale, xffi::RemainingArgs arguments,
                xffi::RemainingRets results, xffi::Span<const float> eps,
                xffi::Span<const int64_t> swiglu, xffi::Span<const int64_t> added, std::string_view,
                int64_t) {
  return guarded(kName, [&] {
    const Attributes a{eps, swiglu, added};
    return run_links(make_links(x, x_scale, arguments, results, a),
                     [](const Link& link, const Product& product, const Link*) {
                       return run_on_cpu(link, product);
                     });
  });
}

xffi::Error cuda(cudaStream_t stream, int32_t ordinal, xffi::AnyBuffer x, xffi::AnyBuffer x_scale,
                 xffi::RemainingArgs arguments, xffi::RemainingRets results,
                 xffi::Span<const float> eps, xffi::Span<const int64_t> swiglu,
                 xffi::Span<const int64_t> added, std::string_view implementation,
                 int64_t capability) {
  return guarded(kName, [&]() -> xffi::Error {
    const ScopedDevice device(ordinal);
    if (device.error() != cudaSuccess) return from_cuda(kName, device.error());
    int known = static_cast<int>(capability);  // One that the call pretends, or 0.
    if (known == 0) {
      const cudaError_t error = device_capability(ordinal, &known);
      if (error != cudaSuccess) return from_cuda(kName, error);
    }
    const Attributes a{eps, swiglu, added};
    const auto links = make_links(x, x_scale, arguments, results, a);
    if (!links.has_value()) return links.error();
    const Context on{implementation, known, ordinal,
                     **results.get<xffi::AnyBuffer>(kLinkResults * links->size()), stream};
    bool has_codes = false;
    return run_links(links, [&](const Link& link, const Product& product, const Link* next) {
      return run_on_cuda(link, product, next, on, &has_codes);
    });
  });
}

template <typename Binding>
auto bind_links(Binding binding) {
  return std::move(binding)
      .template Arg<xffi::AnyBuffer>()
      .template Arg<xffi::AnyBuffer>()
      .RemainingArgs()
      .RemainingRets()
      .template Attr<xffi::Span<const float>>("eps")
      .template Attr<xffi::Span<const int64_t>>("swiglu")
      .template Attr<xffi::Span<const int64_t>>("added")
      .template Attr<std::string_view>("implementation")
      .template Attr<int64_t>("capability");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER(fused_matmul_cpu, cpu, bind_links(xffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER(fused_matmul_cuda, cuda,
                       bind_links(xffi::Ffi::Bind()
                                      .Ctx<xffi::PlatformStream<cudaStream_t>>()
                                      .Ctx<xffi::DeviceOrdinal>()),
                       {xffi::Traits::kCmdBufferCompatible});

Stages fused_matmul_cpu_stages() {
  return {{"execute", reinterpret_cast<void*>(fused_matmul_cpu)}};
}
Stages fused_matmul_cuda_stages() {
  return {{"execute", reinterpret_cast<void*>(fused_matmul_cuda)}};
}

}  // namespace jax_fp8
