// Checks and messages that the GPU and the CPU handlers share.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdio>
#include <exception>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "ffi/fp8.h"
#include "xla/ffi/api/ffi.h"

namespace jax_fp8 {

namespace xffi = xla::ffi;

// Streams would do the same, but where libstdc++ is linked into the module, those of another copy
// in the process may be given the wrong locale.
inline void append(std::string* text, std::string_view part) { text->append(part); }
template <typename Number, typename = std::enable_if_t<std::is_arithmetic_v<Number>>>
void append(std::string* text, Number part) {
  if constexpr (std::is_integral_v<Number>) {
    text->append(std::to_string(part));
  } else {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%g", static_cast<double>(part));
    text->append(digits);
  }
}

// Builds a message from text and numbers.
template <typename... Parts>
std::string join(const Parts&... parts) {
  std::string text;
  (append(&text, parts), ...);
  return text;
}

template <typename... Parts>
xffi::Error invalid(const Parts&... parts) {
  return xffi::Error(xffi::ErrorCode::kInvalidArgument, join(parts...));
}

inline bool to_type(xffi::DataType dtype, Type* type) {
  switch (dtype) {
    case xffi::DataType::F32:
      *type = Type::kF32;
      return true;
    case xffi::DataType::BF16:
      *type = Type::kBF16;
      return true;
    case xffi::DataType::F16:
      *type = Type::kF16;
      return true;
    case xffi::DataType::F8E4M3FN:
      *type = Type::kE4M3;
      return true;
    case xffi::DataType::F8E5M2:
      *type = Type::kE5M2;
      return true;
    default:
      return false;
  }
}

inline std::vector<int64_t> dims(const xffi::AnyBuffer& buffer) {
  return {buffer.dimensions().begin(), buffer.dimensions().end()};
}

// Whether it stands for an operand or a result that is not there.
inline bool absent(const xffi::AnyBuffer& buffer) {
  return dims(buffer) == std::vector<int64_t>{0};
}

// As "[2,16,32]".
inline std::string show(const std::vector<int64_t>& shape) {
  std::string text;
  for (const int64_t extent : shape) text += (text.empty() ? "" : ",") + std::to_string(extent);
  return "[" + text + "]";
}

// As "float8_e4m3fn[2,16,32]".
inline std::string describe(const xffi::AnyBuffer& buffer) {
  Type type;
  const bool known = to_type(buffer.element_type(), &type);
  const std::string name =
      known ? type_name(type) : join("dtype ", static_cast<int>(buffer.element_type()));
  return name + show(dims(buffer));
}

inline bool is_f32(const xffi::AnyBuffer& buffer) {
  return buffer.element_type() == xffi::DataType::F32;
}

inline bool known_block(int64_t rows, int64_t cols) {
  return (rows == 0 && cols == 0) || (rows == 1 && cols == 0) || (rows == 1 && cols == 128) ||
         (rows == 128 && cols == 128);
}

inline xffi::Error from_cuda(const char* operation, cudaError_t error) {
  if (error == cudaSuccess) return xffi::Error::Success();
  std::string message = join(operation, ": CUDA reports ", cudaGetErrorString(error));
  if (error == cudaErrorInsufficientDriver) {
    message += " (jax_fp8 carries CUDA 13's runtime, which needs a driver of the 580 series)";
  }
  return xffi::Error(xffi::ErrorCode::kInternal, message);
}

// The compute capability of a device, as 90 for 9.0.
inline cudaError_t device_capability(int ordinal, int* capability) {
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal);
  }
  *capability = 10 * major + minor;
  return error;
}

// Runs a handler's body; nothing is thrown across XLA's boundary.
template <typename Body>
xffi::Error guarded(const char* operation, Body body) {
  try {
    return body();
  } catch (const std::exception& error) {
    return xffi::Error(xffi::ErrorCode::kInternal, join(operation, ": ", error.what()));
  } catch (...) {
    return xffi::Error(xffi::ErrorCode::kInternal, join(operation, ": unknown exception"));
  }
}

// Makes a device current, and restores the one before.
class ScopedDevice {
 public:
  explicit ScopedDevice(int ordinal) {
    if (cudaGetDevice(&before_) != cudaSuccess) before_ = -1;
    if (before_ != ordinal) error_ = cudaSetDevice(ordinal);
    changed_ = before_ != ordinal && before_ >= 0;
  }
  ~ScopedDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  ScopedDevice(const ScopedDevice&) = delete;
  ScopedDevice& operator=(const ScopedDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = -1;
  bool changed_ = false;
  cudaError_t error_ = cudaSuccess;
};

// XLA's CPU threads take subnormal numbers as zero; inside of this scope they count.
class ScopedSubnormals {
 public:
#if defined(__SSE2__)
  ScopedSubnormals() : before_(__builtin_ia32_stmxcsr()) {
    __builtin_ia32_ldmxcsr(before_ & ~0x8040u);  // Flush-to-zero and denormals-are-zero.
  }
  ~ScopedSubnormals() { __builtin_ia32_ldmxcsr(before_); }

 private:
  unsigned before_;
#endif
};

}  // namespace jax_fp8
