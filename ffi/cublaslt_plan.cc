#include "ffi/cublaslt_plan.h"

#include <cmath>
#include <map>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "ffi/cublaslt_candidates.h"
#include "ffi/cublaslt_library.h"
#include "ffi/cublaslt_timing.h"
#include "ffi/plan_table.h"

namespace jax_fp8::lt {

struct Plan {
  Plan(const Api& api, Handle handle) : api(api), handle(handle) {}
  ~Plan() {
    if (desc != nullptr) api.MatmulDescDestroy(desc);
    for (const Layout layout : {w, x, d, c}) {
      if (layout != nullptr) api.MatrixLayoutDestroy(layout);
    }
  }

  const Api& api;
  Handle handle;
  std::mutex mutex;  // Of the descriptor, which carries the pointers of a call.
  MatmulDesc desc = nullptr;
  Layout w = nullptr, x = nullptr, d = nullptr, c = nullptr;
  Algo algo{};
  int64_t workspace = 0;  // That the algorithm asks for.
  std::string algorithm;
  std::string choice;
  int64_t candidates = 0;
  int64_t generation = 0;  // Of the choices that it was made from.
  bool hurried = false;    // When something ran: without timing.
  std::string refusal;     // Why there is no algorithm; empty when there is one.
};

namespace {

int lt_type(Type type) {
  switch (type) {
    case Type::kF32:
      return kTypeF32;
    case Type::kBF16:
      return kTypeBF16;
    case Type::kF16:
      return kTypeF16;
    case Type::kE4M3:
      return kTypeE4M3;
    case Type::kE5M2:
      return kTypeE5M2;
  }
  return -1;
}

// All of a problem but the device's ordinal, for the table of choices.
std::string describe(const Problem& key) {
  std::string text = "(" + std::to_string(key.batch) + ", " + std::to_string(key.m) + ", " +
                     std::to_string(key.n) + ", " + std::to_string(key.k) + ") " +
                     type_name(key.x) + " " + type_name(key.w) + " " + type_name(key.d);
  if (key.has_bias) text += std::string(", bias ") + type_name(key.bias);
  if (key.activation != Activation::kNone) {
    text += key.activation == Activation::kRelu ? ", relu" : ", gelu";
  }
  if (key.blocks) {
    text += key.tiles ? ", (1, 128) by (128, 128) scales" : ", (1, 128) scales";
  } else {
    text += !key.scaled ? ", no scales" : key.vectors ? ", row scales" : ", tensor scales";
  }
  if (key.out_scale) text += ", output scale";
  text += key.fast ? ", fast" : ", precise";
  return text + ", workspace " + std::to_string(key.workspace);
}

template <typename T>
Status set(const Api& api, MatmulDesc desc, DescAttribute attribute, T value) {
  return api.MatmulDescSetAttribute(desc, attribute, &value, sizeof value);
}

// Sets what the call has; what it has not stays null, as for every call of the same plan.
Status set_pointers(const Api& api, MatmulDesc desc, const Pointers& at) {
  Status status = kSuccess;
  const auto point = [&](DescAttribute attribute, const void* pointer) {
    if (pointer != nullptr) status |= set(api, desc, attribute, pointer);
  };
  point(kDescAScalePointer, at.w_scale);
  point(kDescBScalePointer, at.x_scale);
  point(kDescBiasPointer, at.bias);
  point(kDescDScalePointer, at.out_scale);
  point(kDescAmaxDPointer, at.amax);
  return status;
}

Layout make_layout(const Api& api, Type type, int64_t rows, int64_t cols, int64_t batch,
                   int64_t stride, Status* status) {
  Layout layout = nullptr;
  *status |= api.MatrixLayoutCreate(&layout, lt_type(type), rows, cols, rows);
  if (batch > 1 && *status == kSuccess) {
    const auto count = static_cast<int32_t>(batch);
    *status |= api.MatrixLayoutSetAttribute(layout, kLayoutBatchCount, &count, sizeof count);
    *status |= api.MatrixLayoutSetAttribute(layout, kLayoutBatchStride, &stride, sizeof stride);
  }
  return layout;
}

// Statuses are or-ed: any that is not kSuccess (0) shows. The heuristics look at the pointers: with
// row scales and none set they find nothing.
std::vector<Candidate> describe_and_ask(const Api& api, const Problem& key, const Pointers& at,
                                        Plan* plan) {
  Status status = api.MatmulDescCreate(&plan->desc, kComputeF32, kTypeF32);
  if (status == kSuccess) {
    status |= set(api, plan->desc, kDescTransA, kOpT);
    status |= set(api, plan->desc, kDescFastAccum, static_cast<int8_t>(key.fast));
    uint32_t epilogue = key.activation == Activation::kRelu   ? kEpilogueRelu
                        : key.activation == Activation::kGelu ? kEpilogueGelu
                                                              : 0;
    if (key.has_bias) {
      epilogue |= kEpilogueBias;
      status |= set(api, plan->desc, kDescBiasDataType, int32_t{lt_type(key.bias)});
    }
    status |= set(api, plan->desc, kDescEpilogue, epilogue ? epilogue : kEpilogueDefault);
    if (key.vectors) {
      status |= set(api, plan->desc, kDescAScaleMode, kScaleOuterVec);
      status |= set(api, plan->desc, kDescBScaleMode, kScaleOuterVec);
    }
    if (key.blocks) {
      const int32_t mode = key.tiles ? kScaleBlock128x128 : kScaleVec128;
      status |= set(api, plan->desc, kDescAScaleMode, mode);
      status |= set(api, plan->desc, kDescBScaleMode, kScaleVec128);
    }
    status |= set_pointers(api, plan->desc, at);
  }
  plan->w = make_layout(api, key.w, key.k, key.n, key.batch, key.k * key.n, &status);
  plan->x = make_layout(api, key.x, key.k, key.m, key.batch, key.k * key.m, &status);
  plan->d = make_layout(api, key.d, key.n, key.m, key.batch, key.n * key.m, &status);
  // C is not read, but its type must be one that goes with an FP8 D.
  plan->c = make_layout(api, is_fp8(key.d) ? Type::kBF16 : key.d, key.n, key.m, key.batch,
                        key.n * key.m, &status);
  if (status != kSuccess) {
    plan->refusal = std::string("cublasLt refuses the description: ") + api.GetStatusString(status);
    return {};
  }
  return find_candidates(api,
                         {plan->handle, plan->desc, plan->w, plan->x, plan->c, plan->d, key.m,
                          key.k, key.workspace, key.vectors},
                         &plan->refusal);
}

void take(const Candidate& candidate, const std::string& choice, Plan* plan) {
  plan->algo = candidate.algo;
  plan->workspace = candidate.workspace;
  plan->algorithm = candidate.name;
  plan->choice = choice;
}

std::string run_algorithm(const Api& api, const Plan& plan, const Algo& algo, int64_t bytes,
                          const Pointers& at, void* workspace, cudaStream_t stream) {
  const float one = 1.0f, zero = 0.0f;
  Status status = set_pointers(api, plan.desc, at);
  if (status == kSuccess) {
    status = api.Matmul(plan.handle, plan.desc, &one, at.w, plan.w, at.x, plan.x, &zero, nullptr,
                        plan.c, at.d, plan.d, &algo, workspace, static_cast<size_t>(bytes), stream);
  }
  return status == kSuccess ? "" : std::string("cublasLtMatmul: ") + api.GetStatusString(status);
}

// One of the candidates, and no other, is taken, whatever a file says.
void choose(const Api& api, const Problem& key, const std::string& gpu, bool may_time,
            const std::vector<Candidate>& candidates, Plan* plan) {
  const auto take_named = [&](const Choice& wanted) {
    for (const Candidate& candidate : candidates) {
      if (candidate.name != wanted.algorithm) continue;
      take(candidate, wanted.origin, plan);
      return true;
    }
    return false;
  };
  plan->candidates = static_cast<int64_t>(candidates.size());
  Choice choice{gpu, version_string(api.GetVersion()), describe(key), "", plan->candidates, 0, ""};
  if (const auto kept = find_choice(choice); kept && take_named(*kept)) return;
  std::string why_first = "heuristic";
  if (candidates.size() > 1 && choosing_is_timed()) {
    if (may_time) {
      const Timed timed =
          time_candidates(key, static_cast<int>(candidates.size()),
                          [&](int i, const Pointers& at, void* workspace, cudaStream_t stream) {
                            return run_algorithm(api, *plan, candidates[i].algo,
                                                 candidates[i].workspace, at, workspace, stream);
                          });
      if (timed.winner >= 0) {
        choice.algorithm = candidates[timed.winner].name;
        choice.ns = std::lround(1e3 * timed.us);
        choice.origin = "timed";
        // Another device of the same kind may have been faster, and decides for both.
        if (take_named(keep_choice(choice))) return;
      }
      why_first += ": " + timed.why_not;
    } else {
      why_first += ": first met when it ran";
    }
  }
  take(candidates[0], why_first, plan);
}

// Handles and plans live as long as the process: at its end the driver may be gone before them.
struct Device {
  Handle handle = nullptr;
  std::string name;   // Equal for devices of equal speed.
  std::mutex timing;  // Taken by who times candidates on it, and never by another device's thread.
};

struct Cache {
  std::mutex mutex;
  std::map<int, Device> devices;
  std::map<Problem, std::shared_ptr<Plan>> plans;

  // The plan, unless it is older than what is now chosen, or should be made anew with more care.
  std::shared_ptr<Plan> find(const Problem& key, bool compiling) {
    const std::lock_guard lock(mutex);
    const auto found = plans.find(key);
    if (found == plans.end()) return nullptr;
    const bool is_old = found->second->generation != choices_generation();
    return is_old || (compiling && found->second->hurried) ? nullptr : found->second;
  }
};

Cache& cache() {
  static Cache* const instance = new Cache;
  return *instance;
}

// The entry of a device, or null with the reason.
Device* find_device(const Api& api, int ordinal, std::string* reason) {
  const std::lock_guard lock(cache().mutex);
  Device& device = cache().devices[ordinal];
  if (device.handle != nullptr) return &device;
  cudaDeviceProp properties;
  if (const cudaError_t error = cudaGetDeviceProperties(&properties, ordinal);
      error != cudaSuccess) {
    *reason = cudaGetErrorString(error);
    return nullptr;
  }
  device.name =
      std::string(properties.name) + ", " + std::to_string(properties.multiProcessorCount) + " SMs";
  if (const Status status = api.Create(&device.handle); status != kSuccess) {
    *reason = std::string("cublasLtCreate: ") + api.GetStatusString(status);
    return nullptr;
  }
  return &device;
}

}  // namespace

int alignment_of(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer) | 256;
  return static_cast<int>(address & -address);
}

std::shared_ptr<Plan> find_plan(const Api& api, const Problem& key, const Pointers& at,
                                bool compiling, std::string* reason) {
  if (auto plan = cache().find(key, compiling)) return plan;
  Device* const device = find_device(api, key.device, reason);
  if (device == nullptr) return nullptr;
  std::unique_lock<std::mutex> timing;
  if (compiling) {
    timing = std::unique_lock(device->timing);
    if (auto plan = cache().find(key, compiling)) return plan;
  }
  const int64_t generation = choices_generation();
  auto plan = std::make_shared<Plan>(api, device->handle);
  const std::vector<Candidate> candidates = describe_and_ask(api, key, at, plan.get());
  if (!candidates.empty()) choose(api, key, device->name, compiling, candidates, plan.get());
  plan->generation = generation;
  plan->hurried = !compiling;
  const std::lock_guard lock(cache().mutex);
  std::shared_ptr<Plan>& kept = cache().plans[key];
  const bool is_better = kept != nullptr && !kept->hurried && kept->generation == generation;
  if (compiling || !is_better) kept = plan;
  return kept;
}

const std::string& refusal(const Plan& plan) { return plan.refusal; }
const std::string& algorithm(const Plan& plan) { return plan.algorithm; }
int64_t workspace(const Plan& plan) { return plan.workspace; }
const std::string& choice(const Plan& plan) { return plan.choice; }
int64_t candidates(const Plan& plan) { return plan.candidates; }

std::string multiply(const Api& api, Plan* plan, const Pointers& at, void* workspace,
                     cudaStream_t stream) {
  const std::lock_guard lock(plan->mutex);
  const std::string error =
      run_algorithm(api, *plan, plan->algo, plan->workspace, at, workspace, stream);
  return error.empty() ? "" : error + " (" + plan->algorithm + ")";
}

}  // namespace jax_fp8::lt
