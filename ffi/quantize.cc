// The handlers of jax_fp8_quantize: checks and dispatch. And its loop on the host.
#include "ffi/quantize.h"

#include <algorithm>
#include <utility>

#include "ffi/checks.h"
#include "ffi/handlers.h"
#include "ffi/journal.h"

namespace jax_fp8 {
namespace {

constexpr char kName[] = "jax_fp8_quantize";

using Result = xffi::Result<xffi::AnyBuffer>;

xffi::Error make(xffi::AnyBuffer x, xffi::AnyBuffer given, Result data, Result scale, Result amax,
                 Result scratch, int64_t block_rows, int64_t block_cols, bool power_of_two,
                 Quantize* q) {
  if (!to_type(x.element_type(), &q->x_type) || is_fp8(q->x_type) || dims(x).size() != 3) {
    return invalid(kName,
                   ": x must be (batch, rows, columns) of float32, bfloat16 or float16, got ",
                   describe(x));
  }
  if (!to_type(data->element_type(), &q->data_type) || !is_fp8(q->data_type) ||
      dims(*data) != dims(x)) {
    return invalid(kName, ": the data must be float8_e4m3fn or float8_e5m2 of the shape of x ",
                   describe(x), ", got ", describe(*data));
  }
  if (!known_block(block_rows, block_cols)) {
    return invalid(kName, ": unknown block (", block_rows, ", ", block_cols, ")");
  }
  const auto shape = dims(x);
  const std::vector<int64_t> want = {shape[0], scale_extent(shape[1], static_cast<int>(block_rows)),
                                     scale_extent(shape[2], static_cast<int>(block_cols))};
  if (!is_f32(*scale) || dims(*scale) != want) {
    return invalid(kName, ": the scale must be float32[", want[0], ",", want[1], ",", want[2],
                   "] for x ", describe(x), " and block (", block_rows, ", ", block_cols, "), got ",
                   describe(*scale));
  }
  const bool is_static = dims(given) == want;
  if (!is_f32(given) || (!is_static && given.element_count() != 0)) {
    return invalid(kName, ": a static scale must have the shape of the scale ", describe(*scale),
                   ", got ", describe(given));
  }
  const bool has_amax = dims(*amax) == want;
  if (!is_f32(*amax) || (!has_amax && (amax->element_count() != 0 || !is_static))) {
    return invalid(kName, ": the amax must have the shape of the scale ", describe(*scale),
                   ", got ", describe(*amax));
  }
  if (is_static && power_of_two) {
    return invalid(kName, ": power_of_two is for dynamic scales, and a scale is given");
  }
  q->power_of_two = power_of_two;
  q->batch = shape[0];
  q->rows = shape[1];
  q->cols = shape[2];
  q->block_rows = static_cast<int>(block_rows);
  q->block_cols = static_cast<int>(block_cols);
  q->x = x.untyped_data();
  q->given = is_static ? static_cast<const float*>(given.untyped_data()) : nullptr;
  q->data = static_cast<uint8_t*>(data->untyped_data());
  q->scale = static_cast<float*>(scale->untyped_data());
  q->amax = has_amax ? static_cast<float*>(amax->untyped_data()) : nullptr;
  q->scratch = static_cast<uint32_t*>(scratch->untyped_data());
  if (needs_scratch(*q) && scratch->size_bytes() < kScratchWords * sizeof(uint32_t)) {
    return invalid(kName, ": a dynamic scale of a whole tensor needs scratch of ",
                   kScratchWords * sizeof(uint32_t), " bytes, got ", scratch->size_bytes());
  }
  return xffi::Error::Success();
}

bool has_scales(const Quantize& q) {
  return q.batch * scale_extent(q.rows, q.block_rows) * scale_extent(q.cols, q.block_cols) > 0;
}

void note_quantize(const Quantize& q, const char* platform) {
  note({{"operation", "quantize"},
        {"implementation", "kernel"},
        {"platform", platform},
        {"shape", std::vector<int64_t>{q.batch, q.rows, q.cols}},
        {"dtypes", std::vector<std::string>{type_name(q.x_type), type_name(q.data_type)}},
        {"granularity", granularity_name(q.block_rows, q.block_cols)},
        {"scaling", q.given != nullptr ? "static" : "dynamic"}});
}

xffi::Error cpu(xffi::AnyBuffer x, xffi::AnyBuffer given, Result data, Result scale, Result amax,
                Result scratch, int64_t block_rows, int64_t block_cols, bool power_of_two) {
  return guarded(kName, [&] {
    Quantize q{};
    const xffi::Error error =
        make(x, given, data, scale, amax, scratch, block_rows, block_cols, power_of_two, &q);
    if (error.failure()) return error;
    note_quantize(q, "cpu");
    quantize_host(q);
    return xffi::Error::Success();
  });
}

xffi::Error cuda(cudaStream_t stream, int32_t ordinal, xffi::AnyBuffer x, xffi::AnyBuffer given,
                 Result data, Result scale, Result amax, Result scratch, int64_t block_rows,
                 int64_t block_cols, bool power_of_two) {
  return guarded(kName, [&] {
    Quantize q{};
    const xffi::Error error =
        make(x, given, data, scale, amax, scratch, block_rows, block_cols, power_of_two, &q);
    if (error.failure()) return error;
    note_quantize(q, "cuda");
    if (!has_scales(q)) return xffi::Error::Success();  // Nothing to write.
    const ScopedDevice device(ordinal);
    if (device.error() != cudaSuccess) return from_cuda(kName, device.error());
    return from_cuda(kName, quantize_device(q, stream));
  });
}

template <typename Binding>
auto bind_buffers(Binding binding) {
  return std::move(binding)
      .template Arg<xffi::AnyBuffer>()
      .template Arg<xffi::AnyBuffer>()
      .template Ret<xffi::AnyBuffer>()
      .template Ret<xffi::AnyBuffer>()
      .template Ret<xffi::AnyBuffer>()
      .template Ret<xffi::AnyBuffer>()
      .template Attr<int64_t>("block_rows")
      .template Attr<int64_t>("block_cols")
      .template Attr<bool>("power_of_two");
}

}  // namespace

void quantize_host(const Quantize& q) {
  const ScopedSubnormals subnormals;
  const int64_t edge_rows = q.block_rows == 0 ? std::max<int64_t>(q.rows, 1) : q.block_rows;
  const int64_t edge_cols = q.block_cols == 0 ? std::max<int64_t>(q.cols, 1) : q.block_cols;
  int64_t index = 0;
  for (int64_t b = 0; b < q.batch; ++b) {
    for (int64_t r0 = 0; r0 < std::max<int64_t>(q.rows, q.block_rows == 0); r0 += edge_rows) {
      for (int64_t c0 = 0; c0 < std::max<int64_t>(q.cols, q.block_cols == 0); c0 += edge_cols) {
        const int64_t r1 = std::min(q.rows, r0 + edge_rows), c1 = std::min(q.cols, c0 + edge_cols);
        const auto each = [&](auto body) {
          for (int64_t r = r0; r < r1; ++r) {
            for (int64_t c = c0; c < c1; ++c) body((b * q.rows + r) * q.cols + c);
          }
        };
        uint32_t bits = 0;  // As integers, where a NaN is the largest.
        each([&](int64_t i) {
          bits = std::max(bits, float_bits(load_as_float(q.x, q.x_type, i)) & 0x7fffffffu);
        });
        const float amax = bits_float(bits);
        const float scale =
            q.given != nullptr ? q.given[index] : dynamic_scale(amax, q.data_type, q.power_of_two);
        q.scale[index] = scale;
        if (q.amax != nullptr) q.amax[index] = amax;
        const float inverse = inverse_scale(scale);
        each([&](int64_t i) {
          const float value = load_as_float(q.x, q.x_type, i);
          q.data[i] = q.data_type == Type::kE4M3 ? quantize_value<Type::kE4M3>(value, inverse)
                                                 : quantize_value<Type::kE5M2>(value, inverse);
        });
        ++index;
      }
    }
  }
}

XLA_FFI_DEFINE_HANDLER(quantize_cpu, cpu, bind_buffers(xffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER(quantize_cuda, cuda,
                       bind_buffers(xffi::Ffi::Bind()
                                        .Ctx<xffi::PlatformStream<cudaStream_t>>()
                                        .Ctx<xffi::DeviceOrdinal>()),
                       {xffi::Traits::kCmdBufferCompatible});

Stages quantize_cpu_stages() { return {{"execute", reinterpret_cast<void*>(quantize_cpu)}}; }
Stages quantize_cuda_stages() { return {{"execute", reinterpret_cast<void*>(quantize_cuda)}}; }

}  // namespace jax_fp8
