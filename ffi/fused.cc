// The handlers of jax_fp8_fused_quantize: checks and dispatch. And its loop on the host.
#include "ffi/fused.h"

#include <algorithm>
#include <limits>
#include <string_view>
#include <utility>
#include <vector>

#include "ffi/checks.h"
#include "ffi/handlers.h"
#include "ffi/journal.h"
#include "ffi/quantize.h"

namespace jax_fp8 {
namespace {

constexpr char kName[] = "jax_fp8_fused_quantize";
constexpr const char* kProducers[] = {"rms_norm", "layer_norm", "swiglu", "gelu"};

struct Arguments {
  xffi::AnyBuffer x, residual, weight, bias, given, data, scale, amax, sum;
  std::string_view producer;
  float eps;
  int64_t block_rows, block_cols;
};

bool is_wide(const xffi::AnyBuffer& buffer, Type* type) {
  return to_type(buffer.element_type(), type) && !is_fp8(*type);
}

xffi::Error make_weight(const Arguments& a, const char* name, const xffi::AnyBuffer& buffer,
                        bool wanted, const Fused& f, const void** data, Type* type) {
  if (!wanted) {
    if (absent(buffer)) return xffi::Error::Success();
    return invalid(kName, ": ", a.producer, " takes no ", name, ", got ", describe(buffer));
  }
  const auto shape = dims(buffer);
  const bool fits = shape.size() == 2 && (shape[0] == 1 || shape[0] == f.batch) &&
                    shape[1] == f.cols && shape[0] == dims(a.weight)[0];
  if (!fits || !is_wide(buffer, type)) {
    return invalid(kName, ": the ", name, " must be (1 or ", f.batch, ", ", f.cols,
                   ") of float32, bfloat16 or float16, as the weight, got ", describe(buffer));
  }
  *data = buffer.untyped_data();
  return xffi::Error::Success();
}

xffi::Error make(const Arguments& a, Fused* f) {
  const auto* producer = std::find(std::begin(kProducers), std::end(kProducers), a.producer);
  if (producer == std::end(kProducers)) {
    return invalid(kName, ": unknown producer '", a.producer, "'");
  }
  f->producer = static_cast<Producer>(producer - std::begin(kProducers));
  const bool norm = f->producer == Producer::kRmsNorm || f->producer == Producer::kLayerNorm;
  const auto x = dims(a.x);
  if (!is_wide(a.x, &f->x_type) || x.size() != 3) {
    return invalid(kName,
                   ": x must be (batch, rows, columns) of float32, bfloat16 or float16, got ",
                   describe(a.x));
  }
  const int64_t parts = f->producer == Producer::kSwiglu ? 2 : 1;
  const auto data = dims(a.data);
  if (!to_type(a.data.element_type(), &f->data_type) || !is_fp8(f->data_type) || data.size() != 3 ||
      data[0] != x[0] || data[1] != x[1] || data[2] * parts != x[2]) {
    return invalid(kName, ": the data of ", a.producer,
                   " must be float8_e4m3fn or float8_e5m2 with ",
                   parts == 2 ? "half the columns" : "the shape", " of x ", describe(a.x), ", got ",
                   describe(a.data));
  }
  if (data[0] * data[1] > std::numeric_limits<int32_t>::max()) {
    return invalid(kName, ": x ", describe(a.x), " has more than 2^31 - 1 rows");
  }
  if (!known_block(a.block_rows, a.block_cols) || a.block_rows > 1) {
    return invalid(kName, ": unknown block (", a.block_rows, ", ", a.block_cols, ")");
  }
  f->batch = data[0];
  f->rows = data[1];
  f->cols = data[2];
  f->block_rows = static_cast<int>(a.block_rows);
  f->block_cols = static_cast<int>(a.block_cols);
  const std::vector<int64_t> want = {f->batch, scale_extent(f->rows, f->block_rows),
                                     scale_extent(f->cols, f->block_cols)};
  if (!is_f32(a.scale) || dims(a.scale) != want) {
    return invalid(kName, ": the scale must be float32[", want[0], ",", want[1], ",", want[2],
                   "] for data ", describe(a.data), ", got ", describe(a.scale));
  }
  const bool is_static = !absent(a.given);
  if (!is_f32(a.given) || (is_static && dims(a.given) != want)) {
    return invalid(kName, ": a static scale must have the shape of the scale ", describe(a.scale),
                   ", got ", describe(a.given));
  }
  const bool needs_amax = !is_static && f->block_rows == 0;
  if (!is_f32(a.amax) || dims(a.amax) != std::vector<int64_t>{needs_amax ? f->batch : 0}) {
    return invalid(kName, ": the amax must be float32[", needs_amax ? f->batch : 0, "], got ",
                   describe(a.amax));
  }
  const bool has_residual = !absent(a.residual);
  if (has_residual &&
      (!norm || dims(a.residual) != x || a.residual.element_type() != a.x.element_type())) {
    return invalid(kName, ": a residual is for norms and must have type and shape of x ",
                   describe(a.x), ", got ", describe(a.residual), " for ", a.producer);
  }
  if (has_residual ? dims(a.sum) != x || a.sum.element_type() != a.x.element_type()
                   : !absent(a.sum)) {
    return invalid(kName, ": the sum must have type and shape of x ", describe(a.x),
                   " where there is a residual, and else none, got ", describe(a.sum));
  }
  xffi::Error error = make_weight(a, "weight", a.weight, norm, *f, &f->weight, &f->weight_type);
  if (error.failure()) return error;
  error = make_weight(a, "bias", a.bias, f->producer == Producer::kLayerNorm, *f, &f->bias,
                      &f->bias_type);
  if (error.failure()) return error;
  if (!(a.eps >= 0.0f && a.eps <= std::numeric_limits<float>::max())) {
    return invalid(kName, ": eps must be finite and not negative, got ", a.eps);
  }
  f->weight_stride = norm && dims(a.weight)[0] != 1 ? f->cols : 0;
  f->eps = a.eps;
  f->x = a.x.untyped_data();
  f->residual = has_residual ? a.residual.untyped_data() : nullptr;
  f->sum = has_residual ? a.sum.untyped_data() : nullptr;
  f->given = is_static ? static_cast<const float*>(a.given.untyped_data()) : nullptr;
  f->data = static_cast<uint8_t*>(a.data.untyped_data());
  f->scale = static_cast<float*>(a.scale.untyped_data());
  f->amax = needs_amax ? static_cast<float*>(a.amax.untyped_data()) : nullptr;
  return xffi::Error::Success();
}

void note_fused(const Arguments& a, const Fused& f, const char* platform) {
  note({{"operation", std::string(a.producer) + "_quantize"},
        {"implementation", "kernel"},
        {"platform", platform},
        {"shape", std::vector<int64_t>{f.batch, f.rows, f.cols}},
        {"dtypes", std::vector<std::string>{type_name(f.x_type), type_name(f.data_type)}},
        {"granularity", granularity_name(f.block_rows, f.block_cols)},
        {"scaling", f.given != nullptr ? "static" : "dynamic"}});
}

using Buffer = xffi::AnyBuffer;
using Result = xffi::Result<xffi::AnyBuffer>;

xffi::Error cpu(Buffer x, Buffer residual, Buffer weight, Buffer bias, Buffer given, Result data,
                Result scale, Result amax, Result sum, std::string_view producer, float eps,
                int64_t block_rows, int64_t block_cols) {
  return guarded(kName, [&] {
    const Arguments a = {x,     residual, weight,   bias, given,      *data,     *scale,
                         *amax, *sum,     producer, eps,  block_rows, block_cols};
    Fused f{};
    const xffi::Error error = make(a, &f);
    if (error.failure()) return error;
    note_fused(a, f, "cpu");
    fused_host(f);
    return xffi::Error::Success();
  });
}

xffi::Error cuda(cudaStream_t stream, int32_t ordinal, Buffer x, Buffer residual, Buffer weight,
                 Buffer bias, Buffer given, Result data, Result scale, Result amax, Result sum,
                 std::string_view producer, float eps, int64_t block_rows, int64_t block_cols) {
  return guarded(kName, [&] {
    const Arguments a = {x,     residual, weight,   bias, given,      *data,     *scale,
                         *amax, *sum,     producer, eps,  block_rows, block_cols};
    Fused f{};
    const xffi::Error error = make(a, &f);
    if (error.failure()) return error;
    note_fused(a, f, "cuda");
    if (scale->element_count() == 0) return xffi::Error::Success();  // Nothing to write.
    const ScopedDevice device(ordinal);
    if (device.error() != cudaSuccess) return from_cuda(kName, device.error());
    return from_cuda(kName, fused_device(f, stream));
  });
}

template <typename Binding>
auto bind_buffers(Binding binding) {
  return std::move(binding)
      .template Arg<Buffer>()
      .template Arg<Buffer>()
      .template Arg<Buffer>()
      .template Arg<Buffer>()
      .template Arg<Buffer>()
      .template Ret<Buffer>()
      .template Ret<Buffer>()
      .template Ret<Buffer>()
      .template Ret<Buffer>()
      .template Attr<std::string_view>("producer")
      .template Attr<float>("eps")
      .template Attr<int64_t>("block_rows")
      .template Attr<int64_t>("block_cols");
}

void add_residual(const Fused& f, int64_t size) {
  const auto add = [&](auto native) {
    using Wide = decltype(native);
    for (int64_t i = 0; i < size; ++i) {
      static_cast<typename Wide::type*>(f.sum)[i] =
          Wide::store(load_as_float(f.x, f.x_type, i) + load_as_float(f.residual, f.x_type, i));
    }
  };
  if (f.x_type == Type::kBF16) {
    add(Native<Type::kBF16>());
  } else if (f.x_type == Type::kF16) {
    add(Native<Type::kF16>());
  } else {
    add(Native<Type::kF32>());
  }
}

// One row of a norm. The sums are float64: the host's are not to be the worst there are.
void normalize(const Fused& f, const void* x, int64_t row, float* values) {
  const int64_t start = row * f.cols, weights = row / f.rows * f.weight_stride;
  double mean = 0.0, moment = 0.0;
  for (int64_t i = 0; i < f.cols; ++i) values[i] = load_as_float(x, f.x_type, start + i);
  if (f.producer == Producer::kLayerNorm) {
    for (int64_t i = 0; i < f.cols; ++i) mean += values[i];
    mean /= static_cast<double>(f.cols);
  }
  const float center = static_cast<float>(mean);
  for (int64_t i = 0; i < f.cols; ++i) {
    values[i] -= center;
    moment += double{values[i]} * values[i];
  }
  const float factor =
      reciprocal_deviation(static_cast<float>(moment / static_cast<double>(f.cols)), f.eps);
  for (int64_t i = 0; i < f.cols; ++i) {
    values[i] = values[i] * load_as_float(f.weight, f.weight_type, weights + i) * factor;
    if (f.bias != nullptr) values[i] += load_as_float(f.bias, f.bias_type, weights + i);
  }
}

}  // namespace

void fused_host(const Fused& f) {
  const ScopedSubnormals subnormals;
  const int64_t rows = f.batch * f.rows;
  const void* x = f.x;
  if (f.residual != nullptr) {
    add_residual(f, rows * f.cols);
    x = f.sum;
  }
  std::vector<float> values(rows * f.cols);
  for (int64_t row = 0; row < rows; ++row) {
    float* const own = values.data() + row * f.cols;
    for (int64_t i = 0; i < f.cols; ++i) {
      if (f.producer == Producer::kGelu)
        own[i] = gelu(load_as_float(x, f.x_type, row * f.cols + i));
      if (f.producer == Producer::kSwiglu) {
        const int64_t gate = row * 2 * f.cols + i;
        own[i] = silu(load_as_float(x, f.x_type, gate)) * load_as_float(x, f.x_type, gate + f.cols);
      }
    }
    if (f.weight != nullptr) normalize(f, x, row, own);
  }
  Quantize q{};
  q.batch = f.batch;
  q.rows = f.rows;
  q.cols = f.cols;
  q.block_rows = f.block_rows;
  q.block_cols = f.block_cols;
  q.x = values.data();
  q.x_type = Type::kF32;
  q.given = f.given;
  q.data = f.data;
  q.data_type = f.data_type;
  q.scale = f.scale;
  quantize_host(q);
}

XLA_FFI_DEFINE_HANDLER(fused_quantize_cpu, cpu, bind_buffers(xffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER(fused_quantize_cuda, cuda,
                       bind_buffers(xffi::Ffi::Bind()
                                        .Ctx<xffi::PlatformStream<cudaStream_t>>()
                                        .Ctx<xffi::DeviceOrdinal>()),
                       {xffi::Traits::kCmdBufferCompatible});

Stages fused_quantize_cpu_stages() {
  return {{"execute", reinterpret_cast<void*>(fused_quantize_cpu)}};
}
Stages fused_quantize_cuda_stages() {
  return {{"execute", reinterpret_cast<void*>(fused_quantize_cuda)}};
}

}  // namespace jax_fp8
