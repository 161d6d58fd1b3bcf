// The handlers of jax_fp8_fused_matmul: checks and dispatch of one or more products, each of which
// multiplies what the one before has made.
#include "ffi/fused_matmul.h"

#include <cmath>
#include <string>
#include <string_view>
#include <utility>

#include "ffi/checks.h"
#include "ffi/cublaslt.h"
#include "ffi/decode.h"
#include "ffi/fused.h"
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

constexpr char kName[] = "jax_fp8_fused_matmul";

// A product of a chain, which multiplies the call's x or the result of the one before.
struct Link {
  // `given` is the scale that x, or its norm, is quantized with.
  xffi::AnyBuffer x, x_scale, w, w_scale, bias, norm, residual, given;
  // The results. All but the first are scratch: what is multiplied, in bfloat16, or quantized with
  // that scale or one of each row; and the sums, which are in bfloat16 where there are many rows.
  xffi::AnyBuffer d, multiplied, scales, sums;
  float eps;
  bool swiglu;
  bool follows;  // Whether another link writes x.

  bool quantizes() const { return multiplied.element_type() == xffi::DataType::F8E4M3FN; }
  bool has_many_rows() const { return sums.element_type() == xffi::DataType::BF16; }
  // Whether the link before can write what this one multiplies.
  bool takes_codes() const { return quantizes() && !absent(given) && absent(norm); }
};
// Of a link, but for x and its scale; and of the call the workspace of cublasLt.
constexpr size_t kArguments = 6, kResults = 4;

struct Attributes {
  xffi::Span<const float> eps;
  xffi::Span<const int64_t> swiglu;  // 0 or 1.
  xffi::Span<const int64_t> added;   // The link whose result is the residual, or -1.
};

xffi::ErrorOr<std::vector<Link>> make_links(xffi::AnyBuffer x, xffi::AnyBuffer x_scale,
                                            const xffi::RemainingArgs& arguments,
                                            const xffi::RemainingRets& results,
                                            const Attributes& a) {
  const size_t count = a.eps.size();
  if (count == 0 || a.swiglu.size() != count || a.added.size() != count ||
      arguments.size() != kArguments * count || results.size() != kResults * count + 1) {
    return xffi::Unexpected(
        invalid(kName, ": each link takes ", kArguments, " arguments, ", kResults,
                " results and an entry of eps, swiglu and added, and the call a workspace; got ",
                arguments.size(), ", ", results.size(), " and ", count, ", ", a.swiglu.size(), ", ",
                a.added.size()));
  }
  std::vector<Link> links;
  for (size_t i = 0; i < count; ++i) {
    const auto argument = [&](size_t place) {
      return *arguments.get<xffi::AnyBuffer>(kArguments * i + place);
    };
    const auto result = [&](size_t place) {
      return **results.get<xffi::AnyBuffer>(kResults * i + place);
    };
    if (a.swiglu[i] != 0 && a.swiglu[i] != 1) {
      return xffi::Unexpected(
          invalid(kName, ": swiglu must be 0 or 1, got ", a.swiglu[i], " for link ", i));
    }
    xffi::AnyBuffer residual = argument(4);
    if (a.added[i] != -1) {
      if (a.added[i] < 0 || static_cast<size_t>(a.added[i]) >= i || !absent(residual)) {
        return xffi::Unexpected(invalid(kName, ": link ", i, " adds the result of link ",
                                        a.added[i], ", which must be before it, and ",
                                        describe(residual)));
      }
      residual = links[static_cast<size_t>(a.added[i])].d;
    }
    links.push_back({i == 0 ? x : links.back().d, x_scale, argument(0), argument(1), argument(2),
                     argument(3), residual, argument(5), result(0), result(1), result(2), result(3),
                     a.eps[i], a.swiglu[i] == 1, i > 0});
  }
  return links;
}

bool is(const xffi::AnyBuffer& buffer, xffi::DataType type, const std::vector<int64_t>& shape) {
  return buffer.element_type() == type && dims(buffer) == shape;
}

xffi::Error make(const Link& a, Product* p) {
  constexpr auto bf16 = xffi::DataType::BF16, f32 = xffi::DataType::F32;
  const auto x = dims(a.x), w = dims(a.w);
  if (x.size() != 2 || w.size() != 2 || x[1] != w[1] || x[1] == 0 || !is(a.x, bf16, x) ||
      !is(a.w, xffi::DataType::F8E4M3FN, w)) {
    return invalid(kName, ": x must be (M, K) of bfloat16 and w (N, K) of float8_e4m3fn, got ",
                   describe(a.x), " and ", describe(a.w));
  }
  p->batch = 1;
  p->m = x[0];
  p->n = w[0];
  p->k = x[1];
  p->swiglu = a.swiglu;
  if (p->swiglu && p->n % 2 != 0) {
    return invalid(kName, ": swiglu takes an even N, got w ", describe(a.w));
  }
  const std::vector<int64_t> d = {p->m, p->d_columns()};
  const bool row_scales = is(a.w_scale, f32, {p->n, 1});
  if (!is(a.x_scale, f32, {1, 1}) || (!row_scales && !is(a.w_scale, f32, {1, 1}))) {
    return invalid(kName, ": the scale of x, which is 1, must be float32[1,1], that of w the same",
                   " or float32[", p->n, ",1]; got ", describe(a.x_scale), " and ",
                   describe(a.w_scale));
  }
  if (!to_type(a.bias.element_type(), &p->bias_type) || is_fp8(p->bias_type) ||
      (!absent(a.bias) && dims(a.bias) != std::vector<int64_t>{p->n})) {
    return invalid(kName, ": the bias must be (N,) of float32, bfloat16 or float16 for w ",
                   describe(a.w), ", got ", describe(a.bias));
  }
  if (!absent(a.norm) && !is(a.norm, bf16, {p->k})) {
    return invalid(kName, ": the norm's weight must be bfloat16[", p->k, "], got ",
                   describe(a.norm));
  }
  if (!is(a.d, bf16, d) || (!absent(a.residual) && !is(a.residual, bf16, d))) {
    return invalid(kName, ": result and residual must be bfloat16", show(d), ", got ",
                   describe(a.d), " and ", describe(a.residual));
  }
  const std::vector<int64_t> scales = {a.quantizes() ? p->m : 0, 1};
  // A bare product of many rows is the result.
  const bool has_sums = !a.has_many_rows() || p->swiglu || !absent(a.residual);
  if (!is(a.multiplied, a.quantizes() ? xffi::DataType::F8E4M3FN : bf16, x) ||
      !is(a.scales, f32, scales) ||
      !is(a.sums, a.has_many_rows() ? bf16 : f32, {has_sums ? p->m : 0, p->n})) {
    return invalid(kName, ": scratch must be bfloat16 for x, or float8_e4m3fn with float32 scales",
                   " of its rows, and float32 or bfloat16 for the product, got ",
                   describe(a.multiplied), ", ", describe(a.scales), " and ", describe(a.sums));
  }
  if (!absent(a.given) && (!a.quantizes() || !is(a.given, f32, {1, 1}))) {
    return invalid(kName, ": a static scale must be float32[1,1] and x quantized, got ",
                   describe(a.given), " and ", describe(a.multiplied));
  }
  if (!std::isfinite(a.eps) || a.eps < 0.0f) {
    return invalid(kName, ": eps must be finite and not negative, got ", a.eps);
  }
  const auto pointer = [](const xffi::AnyBuffer& buffer) {
    return absent(buffer) ? nullptr : static_cast<const __nv_bfloat16*>(buffer.untyped_data());
  };
  p->x = {static_cast<const uint8_t*>(a.x.untyped_data()),
          static_cast<const float*>(a.x_scale.untyped_data()),
          Type::kBF16,
          0,
          0,
          1,
          0};
  p->w = {static_cast<const uint8_t*>(a.w.untyped_data()),
          static_cast<const float*>(a.w_scale.untyped_data()),
          Type::kE4M3,
          row_scales ? 1 : 0,
          0,
          1,
          0};
  p->bias = absent(a.bias) ? nullptr : a.bias.untyped_data();
  p->d = a.d.untyped_data();
  p->d_type = Type::kBF16;
  p->norm_weight = pointer(a.norm);
  p->eps = a.eps;
  p->residual = pointer(a.residual);
  return xffi::Error::Success();
}

// The product of what `prepare` makes, and what stands behind it.
Product prepared(const Product& fused, const Link& a) {
  Product p = fused;
  if (a.quantizes() || fused.norm_weight != nullptr) {
    p.x.data = static_cast<const uint8_t*>(a.multiplied.untyped_data());
  }
  if (a.quantizes()) {
    const bool is_static = !absent(a.given);
    p.x.scale = static_cast<const float*>((is_static ? a.given : a.scales).untyped_data());
    p.x.type = Type::kE4M3;
    p.x.block_rows = is_static ? 0 : 1;
  }
  p.norm_weight = nullptr;
  return p;
}

// The bare product among the steps.
Product product_of(const Product& fused, const Link& a) {
  Product p = prepared(fused, a);
  const bool has_sums = a.sums.element_count() != 0;
  if (has_sums) p.d = a.sums.untyped_data();
  p.d_type = a.has_many_rows() ? Type::kBF16 : Type::kF32;
  p.fast = a.has_many_rows();
  p.residual = nullptr;
  p.swiglu = false;
  return p;
}

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
    return "quantized, with many rows, it takes K in steps of 16 and columns in steps of 8, with "
           "compute capability 9.0";
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

void note_fused(const Product& p, const Link& a, const char* platform, const char* implementation) {
  note({{"operation", "fused_matmul"},
        {"implementation", implementation},
        {"platform", platform},
        {"shape", std::vector<int64_t>{1, p.m, p.n, p.k}},
        {"dtypes",
         std::vector<std::string>{type_name(p.x.type), type_name(p.w.type), type_name(p.d_type)}},
        {"granularity", granularity_name(p.w.block_rows, p.w.block_cols)},
        {"parts", join(p.norm_weight != nullptr ? "norm, " : "", a.quantizes() ? "quantize, " : "",
                       "product", p.bias != nullptr ? ", bias" : "", p.swiglu ? ", swiglu" : "",
                       p.residual != nullptr ? ", residual" : "")}});
}

xffi::Error run_on_cpu(const Link& a) {
  Product p{};
  if (auto error = make(a, &p); error.failure()) return error;
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

xffi::Error run_steps(const Product& fused, const Link& a, const Context& on) {
  const Product p = product_of(fused, a);
  bool is_done = false;
  if (a.has_many_rows() && on.capability >= 89) {
    lt::Ran ran;
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
  if (a.sums.element_count() == 0) return xffi::Error::Success();
  return from_cuda(kName, finish_device(fused, p.d, p.d_type, on.stream));
}

// `next` is the link behind it, or null. Sets whether its codes were written, and reads whether
// this one's were.
xffi::Error run_on_cuda(const Link& a, const Link* next, const Context& on, bool* has_codes) {
  Product p{};
  if (auto error = make(a, &p); error.failure()) return error;
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
  if (!is_prepared) {
    const cudaError_t error = prepare_on_device(p, a, on.stream);
    if (error != cudaSuccess) return from_cuda(kName, error);
  }
  if (!in_one) {
    note_fused(p, a, "cuda", "steps");
    return run_steps(p, a, on);
  }
  if (!a.has_many_rows()) {
    note_fused(p, a, "cuda", "small_m");
    return from_cuda(kName, small_m_hopper(after, on.stream, true));
  }
  if (next != nullptr && next->takes_codes()) {
    after.codes = static_cast<uint8_t*>(next->multiplied.untyped_data());
    after.codes_scale = static_cast<const float*>(next->given.untyped_data());
    *has_codes = true;
  }
  note_fused(p, a, "cuda", "large_m");
  return from_cuda(kName, large_m_hopper(after, on.stream));
}
// Runs one link after the other, each told which one is behind it.
template <typename Run>
xffi::Error run_links(const xffi::ErrorOr<std::vector<Link>>& links, Run run) {
  if (!links.has_value()) return links.error();
  const Link* const end = links->data() + links->size();
  for (const Link* link = links->data(); link != end; ++link) {
    if (auto error = run(*link, link + 1 == end ? nullptr : link + 1); error.failure()) {
      return error;
    }
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
                     [](const Link& link, const Link*) { return run_on_cpu(link); });
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
                     **results.get<xffi::AnyBuffer>(kResults * links->size()), stream};
    bool has_codes = false;
    return run_links(links, [&](const Link& link, const Link* next) {
      return run_on_cuda(link, next, on, &has_codes);
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
