#include "ffi/fused_matmul_link.h"

#include <cmath>

namespace jax_fp8 {
namespace {

constexpr const char* kName = kFusedMatmul;

bool is(const xffi::AnyBuffer& buffer, xffi::DataType type, const std::vector<int64_t>& shape) {
  return buffer.element_type() == type && dims(buffer) == shape;
}

}  // namespace

xffi::ErrorOr<std::vector<Link>> make_links(xffi::AnyBuffer x, xffi::AnyBuffer x_scale,
                                            const xffi::RemainingArgs& arguments,
                                            const xffi::RemainingRets& results,
                                            const Attributes& a) {
  const size_t count = a.eps.size();
  if (count == 0 || a.swiglu.size() != count || a.added.size() != count ||
      arguments.size() != kLinkArguments * count || results.size() != kLinkResults * count + 1) {
    return xffi::Unexpected(
        invalid(kName, ": each link takes ", kLinkArguments, " arguments, ", kLinkResults,
                " results and an entry of eps, swiglu and added, and the call a workspace; got ",
                arguments.size(), ", ", results.size(), " and ", count, ", ", a.swiglu.size(), ", ",
                a.added.size()));
  }
  std::vector<Link> links;
  for (size_t i = 0; i < count; ++i) {
    const auto argument = [&](size_t place) {
      return *arguments.get<xffi::AnyBuffer>(kLinkArguments * i + place);
    };
    const auto result = [&](size_t place) {
      return **results.get<xffi::AnyBuffer>(kLinkResults * i + place);
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

xffi::Error make_product(const Link& a, Product* p) {
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

}  // namespace jax_fp8
