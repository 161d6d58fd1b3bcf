// The handlers of jax_fp8_scaled_matmul: checks and dispatch.
#include <cuda.h>

#include <algorithm>
#include <charconv>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "ffi/checks.h"
#include "ffi/cublaslt.h"
#include "ffi/decode.h"
#include "ffi/decode_hopper.h"
#include "ffi/handlers.h"
#include "ffi/journal.h"
#include "ffi/naive.h"
#include "ffi/small_m.h"
#include "ffi/zero.h"

namespace jax_fp8 {
namespace {

constexpr char kName[] = "jax_fp8_scaled_matmul";

// The arguments as XLA hands them over.
struct Arguments {
  xffi::AnyBuffer x, x_scale, w, w_scale, bias, inverse_out_scale;
  xffi::AnyBuffer d, amax, workspace;  // The results.
  int64_t x_block_rows, x_block_cols, w_block_rows, w_block_cols;
  std::string_view activation;
  bool fast;
  std::string_view implementation;
  int64_t capability;
  std::string_view arrays;  // Dtype, rank and dimensions of each of the nine.
};

// `wide`: it may also be 16 bits wide, with one scale that is 1.
xffi::Error make_operand(const char* name, bool wide, const xffi::AnyBuffer& data,
                         const xffi::AnyBuffer& scale, int64_t block_rows, int64_t block_cols,
                         Operand* operand) {
  const bool known = to_type(data.element_type(), &operand->type) &&
                     (is_fp8(operand->type) || (wide && operand->type != Type::kF32));
  if (!known || dims(data).size() != 3) {
    return invalid(kName, ": ", name, " must be (batch, rows, K) of ",
                   wide ? "float8_e4m3fn, float8_e5m2, bfloat16 or float16, got "
                        : "float8_e4m3fn or float8_e5m2, got ",
                   describe(data));
  }
  if (operand->wide() && (block_rows != 0 || scale.element_count() != 1)) {
    return invalid(kName, ": ", name, " of 16 bits has one scale, which is 1; got block (",
                   block_rows, ", ", block_cols, ") and ", describe(scale));
  }
  if (!known_block(block_rows, block_cols)) {
    return invalid(kName, ": unknown block (", block_rows, ", ", block_cols, ") of ", name);
  }
  const auto shape = dims(data), got = dims(scale);
  const int64_t rows = block_rows == 0 ? 1 : ceil_div(shape[1], block_rows);
  const int64_t cols = block_cols == 0 ? 1 : ceil_div(shape[2], block_cols);
  const bool fits = got.size() == 3 && got[1] == rows && got[2] == cols &&
                    (got[0] == shape[0] || (got[0] == 1 && block_rows == 0));
  if (!is_f32(scale) || !fits) {
    return invalid(kName, ": the scale of ", name, " must be float32[", shape[0], ",", rows, ",",
                   cols, "] for ", describe(data), " and block (", block_rows, ", ", block_cols,
                   "), got ", describe(scale));
  }
  operand->data = static_cast<const uint8_t*>(data.untyped_data());
  operand->scale = static_cast<const float*>(scale.untyped_data());
  operand->block_rows = static_cast<int>(block_rows);
  operand->block_cols = static_cast<int>(block_cols);
  operand->scale_cols = cols;
  operand->scale_batch = got[0] == 1 ? 0 : rows * cols;
  return xffi::Error::Success();
}

std::optional<Activation> to_activation(std::string_view name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  return std::nullopt;
}

xffi::Error make_product(const Arguments& a, Product* p) {
  if (auto error = make_operand("x", true, a.x, a.x_scale, a.x_block_rows, a.x_block_cols, &p->x);
      error.failure()) {
    return error;
  }
  if (auto error = make_operand("w", false, a.w, a.w_scale, a.w_block_rows, a.w_block_cols, &p->w);
      error.failure()) {
    return error;
  }
  const auto x = dims(a.x), w = dims(a.w);
  if (x[0] != w[0] || x[2] != w[2]) {
    return invalid(kName, ": x must be (B, M, K) and w (B, N, K), got ", describe(a.x), " and ",
                   describe(a.w));
  }
  if (!to_type(a.d.element_type(), &p->d_type) ||
      dims(a.d) != std::vector<int64_t>{x[0], x[1], w[1]}) {
    return invalid(kName, ": the result must be (B, M, N) for x ", describe(a.x), " and w ",
                   describe(a.w), ", got ", describe(a.d));
  }
  const auto one_if_fp8 = [&](const xffi::AnyBuffer& buffer) {
    return is_f32(buffer) && buffer.element_count() == (is_fp8(p->d_type) ? 1u : 0u);
  };
  if (!one_if_fp8(a.inverse_out_scale) || !one_if_fp8(a.amax)) {
    return invalid(kName, ": an FP8 result, and no other, has an output scale and an amax; got ",
                   describe(a.d), " with ", describe(a.inverse_out_scale), " and ",
                   describe(a.amax));
  }
  const bool has_bias = a.bias.element_count() != 0;
  if (!to_type(a.bias.element_type(), &p->bias_type) || is_fp8(p->bias_type) ||
      (has_bias && dims(a.bias) != std::vector<int64_t>{w[1]})) {
    return invalid(kName, ": the bias must be (N,) of float32, bfloat16 or float16 for w ",
                   describe(a.w), ", got ", describe(a.bias));
  }
  const auto activation = to_activation(a.activation);
  if (!activation) {
    return invalid(kName, ": activation must be none, relu or gelu, got ", a.activation);
  }
  p->batch = x[0];
  p->m = x[1];
  p->n = w[1];
  p->k = x[2];
  p->bias = has_bias ? a.bias.untyped_data() : nullptr;
  p->activation = *activation;
  p->d = a.d.untyped_data();
  if (is_fp8(p->d_type)) {  // Empty buffers need not have null addresses.
    p->inverse_out_scale = static_cast<const float*>(a.inverse_out_scale.untyped_data());
    p->amax = static_cast<float*>(a.amax.untyped_data());
  }
  p->fast = a.fast && !p->blocks() && !p->x.wide();  // There are no such kernels of these.
  return xffi::Error::Success();
}

xffi::Error refuse(const Arguments& a, const std::string& reason) {
  return xffi::Error(
      xffi::ErrorCode::kUnimplemented,
      join(kName, ": implementation '", a.implementation, "' cannot multiply x ", describe(a.x),
           " by w ", describe(a.w), " to ", describe(a.d), ": ", reason));
}

void note_product(const Product& p, const char* platform, const std::string& implementation,
                  const lt::Ran& ran = {}) {
  Entry entry = {
      {"operation", "scaled_matmul"},
      {"implementation", implementation},
      {"platform", platform},
      {"shape", std::vector<int64_t>{p.batch, p.m, p.n, p.k}},
      {"dtypes",
       std::vector<std::string>{type_name(p.x.type), type_name(p.w.type), type_name(p.d_type)}},
      {"granularity", std::vector<std::string>{granularity_name(p.x.block_rows, p.x.block_cols),
                                               granularity_name(p.w.block_rows, p.w.block_cols)}},
      {"accumulation", p.fast ? "fast" : "precise"}};
  if (!ran.algorithm.empty()) {
    entry["algorithm"] = ran.algorithm;
    entry["workspace"] = ran.workspace;
    entry["cublaslt"] = ran.version;
    entry["choice"] = ran.choice;
    entry["candidates"] = ran.candidates;
  }
  note(std::move(entry));
}

xffi::Error run_on_cpu(const Arguments& a) {
  return guarded(kName, [&] {
    Product p{};
    if (auto error = make_product(a, &p); error.failure()) return error;
    if (a.implementation != "naive") return refuse(a, "the CPU has 'naive' and 'xla' alone");
    note_product(p, "cpu", "naive");
    const ScopedSubnormals subnormals;
    naive_host(p);
    return xffi::Error::Success();
  });
}

// Compiling makes cublasLt's plans, on one device: XLA asks for that when it compiles or loads a
// program. (Its initialize stage it asks for at each run, captured or not: 2 us of the host a
// call.)
enum class Stage { kCompile, kExecute };

xffi::Error run_on_cuda(Stage stage, cudaStream_t stream, int32_t ordinal, const Arguments& a) {
  return guarded(kName, [&]() -> xffi::Error {
    Product p{};
    if (auto error = make_product(a, &p); error.failure()) return error;
    const ScopedDevice device(ordinal);
    if (device.error() != cudaSuccess) return from_cuda(kName, device.error());
    lt::Call call{&p,
                  0,
                  ordinal,
                  a.workspace.untyped_data(),
                  static_cast<int64_t>(a.workspace.element_count()),
                  stream,
                  stage == Stage::kCompile};
    call.capability = static_cast<int>(a.capability);  // One that the call pretends, or 0.
    if (call.capability == 0) {
      const cudaError_t error = device_capability(ordinal, &call.capability);
      if (error != cudaSuccess) return from_cuda(kName, error);
    }
    const bool any = a.implementation.empty();
    const bool execute = stage == Stage::kExecute;
    if (p.batch * p.m * p.n == 0) {
      // Nothing to write but the amax of nothing.
      if (!execute || p.amax == nullptr) return xffi::Error::Success();
      return from_cuda(kName, zero_words(p.amax, 1, stream));
    }
    // Without sums there is no product to give to cublasLt; the naive kernel writes the bias.
    const bool empty = p.k == 0;
    const auto clear_amax = [&] {
      return p.amax == nullptr ? cudaSuccess : zero_words(p.amax, 1, stream);
    };
    if (!empty && (a.implementation == "small_m" || any)) {
      const std::string reason = small_m_refusal(p, call.capability);
      if (!reason.empty() && !any) return refuse(a, reason);
      if (reason.empty() && (!any || small_m_wins(p, call.capability))) {
        if (!execute) return xffi::Error::Success();
        const cudaError_t error = clear_amax();
        if (error != cudaSuccess) return from_cuda(kName, error);
        note_product(p, "cuda", "small_m");
        return from_cuda(kName, small_m_matmul(p, call.capability, stream));
      }
    }
    const bool try_cublaslt = any && call.capability >= 89 && !p.x.wide();
    if (!empty && (a.implementation == "cublaslt" || try_cublaslt)) {
      lt::Ran ran;
      const lt::Result result = execute ? lt::run(call, &ran) : lt::prepare(call);
      if (result.outcome == lt::Outcome::kDone) {
        if (execute) note_product(p, "cuda", "cublaslt", ran);
        return xffi::Error::Success();
      }
      if (result.outcome == lt::Outcome::kFailed) {
        return xffi::Error(xffi::ErrorCode::kInternal,
                           join(kName, ": x ", describe(a.x), ", w ", describe(a.w), " to ",
                                describe(a.d), ": ", result.reason));
      }
      if (!any) return refuse(a, result.reason);
    }
    if (!execute) return xffi::Error::Success();
    const cudaError_t error = clear_amax();
    if (error != cudaSuccess) return from_cuda(kName, error);
    const std::string cannot_decode = decode_refusal(p, call.capability);
    if (empty || a.implementation == "naive" || (any && !cannot_decode.empty())) {
      note_product(p, "cuda", "naive");
      return from_cuda(kName, naive_device(p, stream));
    }
    if (a.implementation != "decode" && !any) return refuse(a, "there is none of that name");
    if (!cannot_decode.empty()) return refuse(a, cannot_decode);
    note_product(p, "cuda", "decode");
    if (decode_hopper_supports(p, call.capability)) {
      return from_cuda(kName, decode_hopper(p, stream));
    }
    return from_cuda(kName, decode_matmul(p, stream));
  });
}

xffi::DataType to_data_type(std::string_view name) {
  if (name == "float8_e4m3fn") return xffi::DataType::F8E4M3FN;
  if (name == "float8_e5m2") return xffi::DataType::F8E5M2;
  if (name == "bfloat16") return xffi::DataType::BF16;
  if (name == "float16") return xffi::DataType::F16;
  if (name == "float32") return xffi::DataType::F32;
  return name == "uint8" ? xffi::DataType::U8 : xffi::DataType::INVALID;
}

// The arrays of a call, of which there is nothing but what `arrays` says: they lie nowhere.
struct Described {
  explicit Described(std::string_view arrays) {
    // No stream reads the numbers, for the reason that checks.h has.
    const auto word = [&] {
      const std::string_view first = arrays.substr(0, arrays.find(' '));
      arrays.remove_prefix(std::min(first.size() + 1, arrays.size()));
      return first;
    };
    const auto number = [&](int64_t* value) {
      const std::string_view text = word();
      const auto end = text.data() + text.size();
      return std::from_chars(text.data(), end, *value).ptr == end && !text.empty();
    };
    while (!arrays.empty()) {
      const xffi::DataType dtype = to_data_type(word());
      int64_t rank = 0;
      if (!number(&rank) || rank < 0 || rank > 8) return;
      std::vector<int64_t>& shape = shapes.emplace_back(rank);
      for (int64_t& size : shape) {
        if (!number(&size)) return;  // It has a name: jax.export leaves it to the caller.
      }
      buffers.push_back({});
      buffers.back().struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
      buffers.back().dtype = static_cast<XLA_FFI_DataType>(dtype);
      buffers.back().data = reinterpret_cast<void*>(kAddress);
      buffers.back().rank = rank;
      buffers.back().dims = shape.data();
    }
  }
  bool is_known() const { return buffers.size() == 9; }
  xffi::AnyBuffer at(int i) const { return xffi::AnyBuffer(&buffers[i]); }

  static constexpr uintptr_t kAddress = 256;  // As aligned as XLA's own.
  std::vector<std::vector<int64_t>> shapes;
  std::vector<XLA_FFI_Buffer> buffers;
};

// XLA does not say what it compiles for: a device that this process works on already, if there is
// one, and not a context on one that is somebody else's. -1 without a GPU.
int device_to_time_on() {
  int current = 0, count = 0;
  if (cudaGetDevice(&current) != cudaSuccess || cudaGetDeviceCount(&count) != cudaSuccess) {
    return -1;
  }
  static const auto state = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &function, 7000,
                                     cudaEnableDefault, &found);
    return reinterpret_cast<decltype(&cuDevicePrimaryCtxGetState)>(function);
  }();
  const auto works = [&](int device) {
    unsigned flags = 0;
    int active = 0;
    return state != nullptr && state(device, &flags, &active) == CUDA_SUCCESS && active != 0;
  };
  for (int device = 0; device < count && !works(current); ++device) {
    if (works(device)) return device;
  }
  return current;
}

// Makes the plans of a call that there will be. Equal devices share what is chosen, and what one
// refuses another may take, so that there are no errors before it runs.
xffi::Error compile(int64_t x_block_rows, int64_t x_block_cols, int64_t w_block_rows,
                    int64_t w_block_cols, std::string_view activation, bool fast,
                    std::string_view implementation, int64_t capability, std::string_view arrays) {
  return guarded(kName, [&]() -> xffi::Error {
    const int ordinal = device_to_time_on();
    const Described all(arrays);
    if (ordinal < 0 || !all.is_known()) return xffi::Error::Success();
    run_on_cuda(Stage::kCompile, nullptr, ordinal,
                {all.at(0), all.at(1), all.at(2), all.at(3), all.at(4), all.at(5), all.at(6),
                 all.at(7), all.at(8), x_block_rows, x_block_cols, w_block_rows, w_block_cols,
                 activation, fast, implementation, capability, arrays});
    return xffi::Error::Success();
  });
}

template <typename Binding>
auto bind_buffers(Binding binding) {
  return std::move(binding)
      .template Arg<xffi::AnyBuffer>()
      .template Arg<xffi::AnyBuffer>()
      .template Arg<xffi::AnyBuffer>()
      .template Arg<xffi::AnyBuffer>()
      .template Arg<xffi::AnyBuffer>()
      .template Arg<xffi::AnyBuffer>()
      .template Ret<xffi::AnyBuffer>()
      .template Ret<xffi::AnyBuffer>()
      .template Ret<xffi::AnyBuffer>();
}

template <typename Binding>
auto bind_attributes(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("x_block_rows")
      .template Attr<int64_t>("x_block_cols")
      .template Attr<int64_t>("w_block_rows")
      .template Attr<int64_t>("w_block_cols")
      .template Attr<std::string_view>("activation")
      .template Attr<bool>("fast_accumulation")
      .template Attr<std::string_view>("implementation")
      .template Attr<int64_t>("capability")
      .template Attr<std::string_view>("arrays");
}

// The handlers take their arguments one by one, in the order of Arguments.
template <typename T>
T plain(T argument) {
  return argument;
}
xffi::AnyBuffer plain(xffi::Result<xffi::AnyBuffer> result) { return *result; }

constexpr auto on_cpu = [](auto... arguments) {
  return run_on_cpu(Arguments{plain(arguments)...});
};
constexpr auto on_cuda = [](cudaStream_t stream, int32_t ordinal, auto... arguments) {
  return run_on_cuda(Stage::kExecute, stream, ordinal, Arguments{plain(arguments)...});
};

}  // namespace

XLA_FFI_DEFINE_HANDLER(matmul_cpu, on_cpu, bind_attributes(bind_buffers(xffi::Ffi::Bind())));
XLA_FFI_DEFINE_HANDLER(matmul_compile, compile, bind_attributes(xffi::Ffi::BindInstantiate()));
XLA_FFI_DEFINE_HANDLER(
    matmul_execute, on_cuda,
    bind_attributes(bind_buffers(
        xffi::Ffi::Bind().Ctx<xffi::PlatformStream<cudaStream_t>>().Ctx<xffi::DeviceOrdinal>())),
    {xffi::Traits::kCmdBufferCompatible});

Stages scaled_matmul_cpu_stages() { return {{"execute", reinterpret_cast<void*>(matmul_cpu)}}; }
Stages scaled_matmul_cuda_stages() {
  return {{"instantiate", reinterpret_cast<void*>(matmul_compile)},
          {"execute", reinterpret_cast<void*>(matmul_execute)}};
}

}  // namespace jax_fp8
