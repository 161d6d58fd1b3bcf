// The device's clock as an XLA custom call: timing.py puts one before a chain and one after it.
//
// Its result is two 32-bit words, nanoseconds, the low one first. An operand says what it waits
// for. It is written against XLA's C interface alone, for that compiles in a moment.
#include <cuda_runtime.h>

#include <cstdint>

#include "xla/ffi/api/c_api.h"

static __global__ void stamp(uint64_t* now) {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  *now = time;
}

extern "C" XLA_FFI_Error* benchmarks_stamp(XLA_FFI_CallFrame* frame) {
  for (auto* at = frame->extension_start; at != nullptr; at = at->next) {
    if (at->type != XLA_FFI_Extension_Metadata) continue;
    XLA_FFI_Metadata* about = reinterpret_cast<XLA_FFI_Metadata_Extension*>(at)->metadata;
    about->api_version.major_version = XLA_FFI_API_MAJOR;
    about->api_version.minor_version = XLA_FFI_API_MINOR;
    about->traits = XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE;
    return nullptr;
  }
  XLA_FFI_Stream_Get_Args stream{};
  stream.struct_size = XLA_FFI_Stream_Get_Args_STRUCT_SIZE;
  stream.ctx = frame->ctx;
  if (XLA_FFI_Error* error = frame->api->XLA_FFI_Stream_Get(&stream)) return error;
  const auto* result = static_cast<const XLA_FFI_Buffer*>(frame->rets.rets[0]);
  stamp<<<1, 1, 0, static_cast<cudaStream_t>(stream.stream)>>>(
      static_cast<uint64_t*>(result->data));
  return nullptr;
}
