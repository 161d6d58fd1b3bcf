// A product of a call of jax_fp8_fused_matmul: its arrays, checked, as what implementations take.
#pragma once

#include <vector>

#include "ffi/checks.h"
#include "ffi/product.h"

namespace jax_fp8 {

// The name of the target.
constexpr char kFusedMatmul[] = "jax_fp8_fused_matmul";

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
constexpr size_t kLinkArguments = 6, kLinkResults = 4;

struct Attributes {
  xffi::Span<const float> eps;
  xffi::Span<const int64_t> swiglu;  // 0 or 1.
  xffi::Span<const int64_t> added;   // The link whose result is the residual, or -1.
};

// The links of a call, which has as many as eps has entries.
xffi::ErrorOr<std::vector<Link>> make_links(xffi::AnyBuffer x, xffi::AnyBuffer x_scale,
                                            const xffi::RemainingArgs& arguments,
                                            const xffi::RemainingRets& results,
                                            const Attributes& a);

// All of a link as one product, of X as it comes.
xffi::Error make_product(const Link& a, Product* p);

// The product of what the norm and the quantization of x make, with what stands behind it.
Product prepared(const Product& fused, const Link& a);

// The bare product among the steps.
Product product_of(const Product& fused, const Link& a);

}  // namespace jax_fp8
