// The handlers of jax_fp8_cast_transpose: checks and dispatch. And its loop on the host.
#include "ffi/cast_transpose.h"

#include <algorithm>
#include <utility>

#include "ffi/checks.h"
#include "ffi/handlers.h"
#include "ffi/journal.h"
#include "ffi/quantize.h"
#include "ffi/stochastic.h"

namespace jax_fp8 {
namespace {

constexpr char kName[] = "jax_fp8_cast_transpose";

using Shape = std::vector<int64_t>;
using Result = xffi::Result<xffi::AnyBuffer>;

struct Operands {
  xffi::AnyBuffer x, given, keys;
};

struct Results {
  Result straight, transposed, straight_scale, transposed_scale, amax, scratch;
};

struct Attributes {
  int64_t entries, block_rows, block_cols;
  bool power_of_two;
};

bool is_absent(const xffi::AnyBuffer& buffer) { return dims(buffer) == Shape{0}; }

// Takes a layout's data and scale, or neither of them.
xffi::Error take_layout(const char* layout, const Shape& shape, const Attributes& attributes,
                        const xffi::AnyBuffer& data, const xffi::AnyBuffer& scale, CastTranspose* q,
                        uint8_t** data_target, float** scale_target) {
  if (is_absent(data) && is_absent(scale)) return xffi::Error::Success();
  Type type;
  if (!to_type(data.element_type(), &type) || !is_fp8(type) || dims(data) != shape ||
      (q->data_type != Type::kF32 && q->data_type != type)) {
    return invalid(kName, ": the ", layout, " data must be float8_e4m3fn or float8_e5m2 of shape ",
                   show(shape), ", got ", describe(data));
  }
  Shape want = {attributes.entries, 1, 1};
  if (attributes.block_rows != 0) {
    want = {shape[0], scale_extent(shape[1], static_cast<int>(attributes.block_rows)),
            scale_extent(shape[2], static_cast<int>(attributes.block_cols))};
  }
  if (!is_f32(scale) || dims(scale) != want) {
    return invalid(kName, ": the ", layout, " scale must be float32", show(want), " for data ",
                   describe(data), ", got ", describe(scale));
  }
  q->data_type = type;
  *data_target = static_cast<uint8_t*>(data.untyped_data());
  *scale_target = static_cast<float*>(scale.untyped_data());
  return xffi::Error::Success();
}

xffi::Error make(const Operands& in, Results out, const Attributes& attributes, CastTranspose* q) {
  const Shape shape = dims(in.x);
  if (!to_type(in.x.element_type(), &q->x_type) || is_fp8(q->x_type) || shape.size() != 3) {
    return invalid(kName,
                   ": x must be (batch, rows, columns) of float32, bfloat16 or float16, got ",
                   describe(in.x));
  }
  if (!known_block(attributes.block_rows, attributes.block_cols)) {
    return invalid(kName, ": unknown block (", attributes.block_rows, ", ", attributes.block_cols,
                   ")");
  }
  const int64_t entries = attributes.entries;
  if (entries < 0 || (entries == 0 ? shape[0] != 0 : shape[0] % entries != 0)) {
    return invalid(kName, ": the batch of x ", describe(in.x), " has no ", entries, " equal parts");
  }
  q->data_type = Type::kF32;
  xffi::Error error = take_layout("straight", shape, attributes, *out.straight, *out.straight_scale,
                                  q, &q->straight, &q->straight_scale);
  if (error.failure()) return error;
  error = take_layout("transposed", {shape[0], shape[2], shape[1]}, attributes, *out.transposed,
                      *out.transposed_scale, q, &q->transposed, &q->transposed_scale);
  if (error.failure()) return error;
  if (q->data_type == Type::kF32) return invalid(kName, ": no layout is asked for");
  const Shape whole = {entries, 1, 1}, lines = {shape[0] * (shape[1] + shape[2])};
  const bool is_tensor = attributes.block_rows == 0;
  const bool is_static = is_tensor && dims(in.given) == whole;
  const bool is_known =
      attributes.block_rows == 1 && attributes.block_cols == 0 && dims(in.given) == lines;
  if (!is_f32(in.given) ||
      !(is_static ? !attributes.power_of_two : is_known || is_absent(in.given))) {
    return invalid(kName, ": a static scale must be float32", show(whole),
                   ", with a scale for the tensor that need not be a power of two, and amaxes that"
                   " are known float32",
                   show(lines), ", with row scales, got ", describe(in.given), " and block (",
                   attributes.block_rows, ", ", attributes.block_cols, ")");
  }
  const bool has_amax = dims(*out.amax) == whole;
  if (!is_f32(*out.amax) ||
      !(has_amax ? is_tensor : is_absent(*out.amax) && (is_static || !is_tensor))) {
    return invalid(kName, ": the amax must be float32", show(whole),
                   " of a tensor, or empty where none is needed, got ", describe(*out.amax));
  }
  const bool has_keys = dims(in.keys) == Shape{entries, 2};
  if (in.keys.element_type() != xffi::DataType::U32 || !(has_keys || is_absent(in.keys))) {
    return invalid(kName, ": the keys must be uint32", show({entries, 2}), ", got ",
                   describe(in.keys));
  }
  q->batch = shape[0];
  q->rows = shape[1];
  q->cols = shape[2];
  q->entries = entries;
  q->block_rows = static_cast<int>(attributes.block_rows);
  q->block_cols = static_cast<int>(attributes.block_cols);
  q->power_of_two = attributes.power_of_two;
  q->x = in.x.untyped_data();
  q->given = is_static ? static_cast<const float*>(in.given.untyped_data()) : nullptr;
  q->known = is_known ? static_cast<const uint32_t*>(in.given.untyped_data()) : nullptr;
  q->keys = has_keys ? static_cast<const uint32_t*>(in.keys.untyped_data()) : nullptr;
  q->amax = has_amax ? static_cast<float*>(out.amax->untyped_data()) : nullptr;
  q->scratch = static_cast<uint32_t*>(out.scratch->untyped_data());
  const size_t needed = scratch_words(*q) * sizeof(uint32_t);
  if (out.scratch->size_bytes() < needed) {
    return invalid(kName, ": these scales need scratch of ", needed, " bytes, got ",
                   out.scratch->size_bytes());
  }
  return xffi::Error::Success();
}

void note_cast(const CastTranspose& q, const char* platform) {
  std::vector<std::string> layouts;
  if (q.straight_scale != nullptr) layouts.push_back("straight");
  if (q.transposed_scale != nullptr) layouts.push_back("transposed");
  note({{"operation", "cast_transpose"},
        {"implementation", "kernel"},
        {"platform", platform},
        {"shape", std::vector<int64_t>{q.batch, q.rows, q.cols}},
        {"dtypes", std::vector<std::string>{type_name(q.x_type), type_name(q.data_type)}},
        {"granularity", granularity_name(q.block_rows, q.block_cols)},
        {"scaling", q.given != nullptr ? "static" : "dynamic"},
        {"layouts", layouts},
        {"rounding", q.keys != nullptr ? "stochastic" : "nearest"}});
}

xffi::Error cpu(xffi::AnyBuffer x, xffi::AnyBuffer given, xffi::AnyBuffer keys, Result straight,
                Result transposed, Result straight_scale, Result transposed_scale, Result amax,
                Result scratch, int64_t entries, int64_t block_rows, int64_t block_cols,
                bool power_of_two) {
  return guarded(kName, [&] {
    CastTranspose q{};
    const xffi::Error error = make(
        {x, given, keys}, {straight, transposed, straight_scale, transposed_scale, amax, scratch},
        {entries, block_rows, block_cols, power_of_two}, &q);
    if (error.failure()) return error;
    note_cast(q, "cpu");
    cast_transpose_host(q);
    return xffi::Error::Success();
  });
}

xffi::Error cuda(cudaStream_t stream, int32_t ordinal, xffi::AnyBuffer x, xffi::AnyBuffer given,
                 xffi::AnyBuffer keys, Result straight, Result transposed, Result straight_scale,
                 Result transposed_scale, Result amax, Result scratch, int64_t entries,
                 int64_t block_rows, int64_t block_cols, bool power_of_two) {
  return guarded(kName, [&] {
    CastTranspose q{};
    const xffi::Error error = make(
        {x, given, keys}, {straight, transposed, straight_scale, transposed_scale, amax, scratch},
        {entries, block_rows, block_cols, power_of_two}, &q);
    if (error.failure()) return error;
    note_cast(q, "cuda");
    if (q.entries == 0) return xffi::Error::Success();  // Nothing to write.
    const ScopedDevice device(ordinal);
    if (device.error() != cudaSuccess) return from_cuda(kName, device.error());
    return from_cuda(kName, cast_transpose_device(q, stream));
  });
}

// --- Amaxes alone --------------------------------------------------------------------------------

constexpr char kAmaxesName[] = "jax_fp8_line_amaxes";

xffi::Error make_amaxes(const xffi::AnyBuffer& x, Result amaxes, CastTranspose* q) {
  const Shape shape = dims(x);
  if (!to_type(x.element_type(), &q->x_type) || is_fp8(q->x_type) || shape.size() != 3) {
    return invalid(kAmaxesName,
                   ": x must be (batch, rows, columns) of float32, bfloat16 or float16, got ",
                   describe(x));
  }
  q->batch = shape[0], q->rows = shape[1], q->cols = shape[2];
  q->entries = q->batch;
  q->block_rows = 1;
  const Shape want = {scratch_words(*q)};
  if (!is_f32(*amaxes) || dims(*amaxes) != want) {
    return invalid(kAmaxesName, ": the amaxes of ", describe(x), " are float32", show(want),
                   ", got ", describe(*amaxes));
  }
  q->x = x.untyped_data();
  q->scratch = static_cast<uint32_t*>(amaxes->untyped_data());
  return xffi::Error::Success();
}

xffi::Error amaxes_cpu(xffi::AnyBuffer x, Result amaxes) {
  return guarded(kAmaxesName, [&] {
    CastTranspose q{};
    const xffi::Error error = make_amaxes(x, amaxes, &q);
    if (error.success()) line_amaxes_host(q);
    return error;
  });
}

xffi::Error amaxes_cuda(cudaStream_t stream, int32_t ordinal, xffi::AnyBuffer x, Result amaxes) {
  return guarded(kAmaxesName, [&] {
    CastTranspose q{};
    const xffi::Error error = make_amaxes(x, amaxes, &q);
    if (error.failure()) return error;
    const ScopedDevice device(ordinal);
    if (device.error() != cudaSuccess) return from_cuda(kAmaxesName, device.error());
    return from_cuda(kAmaxesName, line_amaxes_device(q, stream));
  });
}

template <typename Binding>
auto bind_buffers(Binding binding) {
  return std::move(binding)
      .template Arg<xffi::AnyBuffer>()
      .template Arg<xffi::AnyBuffer>()
      .template Arg<xffi::AnyBuffer>()
      .template Ret<xffi::AnyBuffer>()
      .template Ret<xffi::AnyBuffer>()
      .template Ret<xffi::AnyBuffer>()
      .template Ret<xffi::AnyBuffer>()
      .template Ret<xffi::AnyBuffer>()
      .template Ret<xffi::AnyBuffer>()
      .template Attr<int64_t>("entries")
      .template Attr<int64_t>("block_rows")
      .template Attr<int64_t>("block_cols")
      .template Attr<bool>("power_of_two");
}

// --- The loop on the host ------------------------------------------------------------------------

// One layout: scale by scale, each of `matrices` matrices at once.
void cast_layout(const CastTranspose& q, bool transposed, uint8_t* data, float* scales) {
  const int64_t rows = transposed ? q.cols : q.rows, cols = transposed ? q.rows : q.cols;
  const int64_t each = q.entries == 0 ? 1 : q.batch / q.entries;
  const bool whole = q.block_rows == 0;
  const int64_t matrices = whole ? each : 1, groups = whole ? q.entries : q.batch;
  const int64_t edge_rows = whole ? std::max<int64_t>(rows, 1) : q.block_rows;
  const int64_t edge_cols = q.block_cols == 0 ? std::max<int64_t>(cols, 1) : q.block_cols;
  int64_t index = 0;
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t r0 = 0; r0 < std::max<int64_t>(rows, whole); r0 += edge_rows) {
      for (int64_t c0 = 0; c0 < std::max<int64_t>(cols, q.block_cols == 0); c0 += edge_cols) {
        const int64_t r1 = std::min(rows, r0 + edge_rows), c1 = std::min(cols, c0 + edge_cols);
        const auto for_all = [&](auto body) {  // With the places in this layout and in x.
          for (int64_t m = group * matrices; m < (group + 1) * matrices; ++m) {
            for (int64_t r = r0; r < r1; ++r) {
              for (int64_t c = c0; c < c1; ++c) {
                const int64_t place = (m * rows + r) * cols + c;
                body(m, place, transposed ? (m * q.rows + c) * q.cols + r : place);
              }
            }
          }
        };
        uint32_t bits = 0;  // As integers, where a NaN is the largest.
        for_all([&](int64_t, int64_t, int64_t source) {
          bits = std::max(bits, float_bits(load_as_float(q.x, q.x_type, source)) & 0x7fffffffu);
        });
        if (q.known != nullptr) bits = q.known[(transposed ? q.batch * q.rows : 0) + index];
        const float amax = bits_float(bits);
        const float scale =
            q.given != nullptr ? q.given[group] : dynamic_scale(amax, q.data_type, q.power_of_two);
        scales[index] = scale;
        if (q.amax != nullptr) q.amax[index] = amax;
        const float inverse = inverse_scale(scale);
        const bool e4m3 = q.data_type == Type::kE4M3;
        for_all([&](int64_t m, int64_t place, int64_t source) {
          const float value = load_as_float(q.x, q.x_type, source);

          if (q.keys == nullptr) {
            data[place] = e4m3 ? quantize_value<Type::kE4M3>(value, inverse)
                               : quantize_value<Type::kE5M2>(value, inverse);
            return;
          }
          const int64_t entry = m / each;
          const uint32_t random = random_bits(q.keys[2 * entry], q.keys[2 * entry + 1],
                                              source - entry * each * q.rows * q.cols);
          data[place] = e4m3 ? quantize_random<Type::kE4M3>(value, inverse, random)
                             : quantize_random<Type::kE5M2>(value, inverse, random);
        });
        ++index;
      }
    }
  }
}

}  // namespace

void line_amaxes_host(const CastTranspose& q) {
  const ScopedSubnormals subnormals;
  uint32_t* const columns = q.scratch + q.batch * q.rows;
  std::fill(q.scratch, columns + q.batch * q.cols, 0u);
  for (int64_t place = 0; place < q.batch * q.rows * q.cols; ++place) {
    const uint32_t bits = float_bits(load_as_float(q.x, q.x_type, place)) & 0x7fffffffu;
    const int64_t row = place / q.cols, matrix = row / q.rows;
    for (uint32_t* total : {q.scratch + row, columns + matrix * q.cols + place % q.cols}) {
      *total = std::max(*total, bits);
    }
  }
}

void cast_transpose_host(const CastTranspose& q) {
  const ScopedSubnormals subnormals;
  if (q.straight_scale != nullptr) cast_layout(q, false, q.straight, q.straight_scale);
  if (q.transposed_scale != nullptr) cast_layout(q, true, q.transposed, q.transposed_scale);
}

XLA_FFI_DEFINE_HANDLER(cast_transpose_cpu, cpu, bind_buffers(xffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER(cast_transpose_cuda, cuda,
                       bind_buffers(xffi::Ffi::Bind()
                                        .Ctx<xffi::PlatformStream<cudaStream_t>>()
                                        .Ctx<xffi::DeviceOrdinal>()),
                       {xffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(line_amaxes_cpu, amaxes_cpu,
                       xffi::Ffi::Bind().Arg<xffi::AnyBuffer>().Ret<xffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER(line_amaxes_cuda, amaxes_cuda,
                       xffi::Ffi::Bind()
                           .Ctx<xffi::PlatformStream<cudaStream_t>>()
                           .Ctx<xffi::DeviceOrdinal>()
                           .Arg<xffi::AnyBuffer>()
                           .Ret<xffi::AnyBuffer>(),
                       {xffi::Traits::kCmdBufferCompatible});

Stages cast_transpose_cpu_stages() {
  return {{"execute", reinterpret_cast<void*>(cast_transpose_cpu)}};
}
Stages cast_transpose_cuda_stages() {
  return {{"execute", reinterpret_cast<void*>(cast_transpose_cuda)}};
}
Stages line_amaxes_cpu_stages() { return {{"execute", reinterpret_cast<void*>(line_amaxes_cpu)}}; }
Stages line_amaxes_cuda_stages() {
  return {{"execute", reinterpret_cast<void*>(line_amaxes_cuda)}};
}

}  // namespace jax_fp8
