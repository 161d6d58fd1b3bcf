#include "ffi/cublaslt_candidates.h"

#include <utility>

#include "ffi/cublaslt_library.h"

namespace jax_fp8::lt {
namespace {

constexpr int kAsked = 32;  // cublasLt 13.1 gives up to 8.

// What cublasLt offers is the same for all multiples of 16 bytes, which all of our addresses are.
constexpr uint32_t kAlignment = 16;

// Up to so many rows, cublasLt's only offer for row scales is up to twice as slow as another.
constexpr int64_t kFewRows = 512;

int64_t split_of(const Api& api, const Algo& algo) {
  int32_t split = 0;
  size_t written = 0;
  api.MatmulAlgoConfigGetAttribute(&algo, kAlgoSplitK, &split, sizeof split, &written);
  return split;
}

// Splitting K unevenly gave wrong results (releases 12.6.3 to 13.4).
bool split_is_safe(const Api& api, const Algo& algo, int64_t k) {
  const int64_t split = split_of(api, algo);
  const size_t version = api.GetVersion();
  const bool affected = version >= 120603 && version < 130500;
  return !affected || split <= 1 || k % (split * 16) == 0;
}

// The same algorithm without splitting K, if cublasLt takes that for this product.
bool unsplit(const Api& api, const Description& product, HeuristicResult* candidate) {
  Algo algo = candidate->algo;
  const int32_t split = 1;
  const uint32_t scheme = 0;  // No reduction.
  Status status = api.MatmulAlgoConfigSetAttribute(&algo, kAlgoSplitK, &split, sizeof split);
  status |= api.MatmulAlgoConfigSetAttribute(&algo, kAlgoReductionScheme, &scheme, sizeof scheme);
  if (status != kSuccess) return false;
  HeuristicResult checked{};
  status = api.MatmulAlgoCheck(product.handle, product.desc, product.w, product.x, product.c,
                               product.d, &algo, &checked);
  if (status != kSuccess || checked.state != kSuccess ||
      static_cast<int64_t>(checked.workspace_size) > product.workspace) {
    return false;
  }
  *candidate = checked;
  candidate->algo = algo;
  return true;
}

std::string describe(const Api& api, const Algo& algo) {
  const auto get = [&](int attribute) {
    int64_t value = 0;  // The attributes are of 2 and 4 bytes.
    size_t written = 0;
    if (api.MatmulAlgoConfigGetAttribute(&algo, attribute, &value, 4, &written) != kSuccess) {
      api.MatmulAlgoConfigGetAttribute(&algo, attribute, &value, 2, &written);
    }
    return std::to_string(value);
  };
  return "id " + get(kAlgoId) + ", tile " + get(kAlgoTile) + ", stages " + get(kAlgoStages) +
         ", cluster " + get(kAlgoCluster) + ", split-k " + get(kAlgoSplitK) + ", reduction " +
         get(kAlgoReductionScheme) + ", swizzle " + get(kAlgoSwizzle) + ", custom " +
         get(kAlgoCustom) + ", inner " + get(kAlgoInnerShape);
}

// What the heuristics give for the product as it is described now, if an algorithm may ask for so
// much workspace.
Status ask(const Api& api, const Description& product, int64_t workspace,
           std::vector<HeuristicResult>* found) {
  Preference preference = nullptr;
  Status status = api.MatmulPreferenceCreate(&preference);
  if (status != kSuccess) return status;
  const auto prefer = [&](PreferenceAttribute attribute, auto value) {
    status |= api.MatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value);
  };
  prefer(kPrefMaxWorkspace, static_cast<uint64_t>(workspace));
  for (const auto attribute :
       {kPrefMinAlignmentA, kPrefMinAlignmentB, kPrefMinAlignmentC, kPrefMinAlignmentD}) {
    prefer(attribute, kAlignment);
  }
  int count = 0;
  std::vector<HeuristicResult> results(kAsked);
  if (status == kSuccess) {
    status =
        api.MatmulAlgoGetHeuristic(product.handle, product.desc, product.w, product.x, product.c,
                                   product.d, preference, kAsked, results.data(), &count);
  }
  if (status == kSuccess) found->insert(found->end(), results.begin(), results.begin() + count);
  api.MatmulPreferenceDestroy(preference);
  return status;
}

// Without any workspace first. With 4 bytes of it, the same kernels take their tiles from a counter
// there, which a node of its own has to zero before each product: 1 to 2 us of the device and 0.7
// of the host, which is more than that saves unless tiles are many and large.
Status ask(const Api& api, const Description& product, std::vector<HeuristicResult>* found) {
  const Status without = ask(api, product, 0, found);
  const Status with = product.workspace > 0 ? ask(api, product, product.workspace, found) : without;
  return without == kSuccess ? without : with;
}

// For row scales cublasLt 13.1 offers a single algorithm, but takes most of those that it offers
// for tensor scales, if they do not split K.
std::vector<HeuristicResult> borrow(const Api& api, const Description& product) {
  const auto set_mode = [&](int32_t mode) {
    return api.MatmulDescSetAttribute(product.desc, kDescAScaleMode, &mode, sizeof mode) |
           api.MatmulDescSetAttribute(product.desc, kDescBScaleMode, &mode, sizeof mode);
  };
  std::vector<HeuristicResult> found, taken;
  if (set_mode(kScaleScalar) == kSuccess) ask(api, product, &found);
  if (set_mode(kScaleOuterVec) != kSuccess) return {};
  for (HeuristicResult& result : found) {
    if (result.state == kSuccess && unsplit(api, product, &result)) taken.push_back(result);
  }
  return taken;
}

}  // namespace

std::vector<Candidate> find_candidates(const Api& api, const Description& product,
                                       std::string* why) {
  std::vector<HeuristicResult> found;
  const Status status = ask(api, product, &found);
  if (product.vectors && !found.empty()) {
    const std::vector<HeuristicResult> more = borrow(api, product);
    found.insert(product.m <= kFewRows ? found.begin() : found.end(), more.begin(), more.end());
  }
  std::vector<Candidate> candidates;
  const auto add = [&](const HeuristicResult& result) {
    std::string name =
        describe(api, result.algo) + ", workspace " + std::to_string(result.workspace_size);
    for (const Candidate& other : candidates) {
      if (other.name == name) return;
    }
    candidates.push_back(
        {result.algo, static_cast<int64_t>(result.workspace_size), std::move(name)});
  };
  for (const HeuristicResult& result : found) {
    if (result.state == kSuccess && split_is_safe(api, result.algo, product.k)) add(result);
  }
  // Some are faster without their split, too.
  for (HeuristicResult& result : found) {
    const bool splits = result.state == kSuccess && split_of(api, result.algo) > 1;
    if (splits && unsplit(api, product, &result)) add(result);
  }
  if (candidates.empty()) {
    *why = "cublasLt " + version_string(api.GetVersion()) + " has no algorithm for it" +
           (status == kSuccess ? "" : std::string(": ") + api.GetStatusString(status));
  }
  return candidates;
}

}  // namespace jax_fp8::lt
