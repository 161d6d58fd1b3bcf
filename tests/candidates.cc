// ffi/cublaslt_candidates.cc with a cublasLt that is made up, and ffi/race.h with a clock that is.
// test_candidates.py compiles and runs this; it prints what is wrong and exits with 1.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "ffi/cublaslt_candidates.h"
#include "ffi/race.h"

namespace lt = jax_fp8::lt;
using jax_fp8::Race;

namespace {

int wrong = 0;
#define EXPECT(condition)                                     \
  do {                                                        \
    if (!(condition)) {                                       \
      std::printf("line %d: not %s\n", __LINE__, #condition); \
      ++wrong;                                                \
    }                                                         \
  } while (false)

// --- A cublasLt: an algorithm is its tile, its split of K and its reduction ----------------------

struct Fake {
  size_t version = 130100;
  std::vector<lt::Algo> offered, offered_for_scalars;
  std::vector<uint64_t> refused;  // Tiles that no check passes.
  std::vector<uint64_t> counted;  // Tiles that are taken from a counter, where there may be one.
  uint64_t workspace = 0;         // That the preference allows.
  int32_t a_mode = 0, b_mode = 0;
  int status = 0;
} fake;

lt::Algo algo(uint64_t tile, uint64_t split = 1) {
  return {{tile, split, split > 1 ? 2u : 0u, 0, 0, 0, 0, 0}};
}

lt::Api make_api() {
  lt::Api api{};
  api.GetVersion = [] { return fake.version; };
  api.GetStatusString = [](lt::Status) { return "broken"; };
  api.MatmulDescSetAttribute = [](lt::MatmulDesc, int attribute, const void* value, size_t size) {
    std::memcpy(attribute == lt::kDescAScaleMode ? &fake.a_mode : &fake.b_mode, value, size);
    return attribute == lt::kDescAScaleMode || attribute == lt::kDescBScaleMode ? 0 : 1;
  };
  api.MatmulPreferenceCreate = [](lt::Preference*) { return 0; };
  api.MatmulPreferenceDestroy = [](lt::Preference) { return 0; };
  api.MatmulPreferenceSetAttribute = [](lt::Preference, int attribute, const void* value,
                                        size_t size) {
    if (attribute == lt::kPrefMaxWorkspace) std::memcpy(&fake.workspace, value, size);
    return 0;
  };
  api.MatmulAlgoGetHeuristic = [](lt::Handle, lt::MatmulDesc, lt::Layout, lt::Layout, lt::Layout,
                                  lt::Layout, lt::Preference, int asked, lt::HeuristicResult* found,
                                  int* count) {
    *count = 0;
    const bool rows = fake.a_mode == lt::kScaleOuterVec && fake.b_mode == lt::kScaleOuterVec;
    for (const lt::Algo& each : rows ? fake.offered : fake.offered_for_scalars) {
      size_t needed = each.data[1] > 1 ? 100 : 0;
      for (const uint64_t tile : fake.counted) {
        if (tile == each.data[0] && fake.workspace >= 4) needed = 4;
      }
      if (*count < asked && needed <= fake.workspace) {
        found[(*count)++] = {each, needed, 0, 1.0f, {}};
      }
    }
    return fake.status;
  };
  api.MatmulAlgoConfigGetAttribute = [](const lt::Algo* algo, int attribute, void* value,
                                        size_t size, size_t* written) {
    const uint64_t word = attribute == lt::kAlgoTile              ? algo->data[0]
                          : attribute == lt::kAlgoSplitK          ? algo->data[1]
                          : attribute == lt::kAlgoReductionScheme ? algo->data[2]
                                                                  : 0;
    std::memcpy(value, &word, size);
    *written = size;
    return 0;
  };
  api.MatmulAlgoConfigSetAttribute = [](lt::Algo* algo, int attribute, const void* value, size_t) {
    uint32_t word;
    std::memcpy(&word, value, 4);
    algo->data[attribute == lt::kAlgoSplitK ? 1 : 2] = word;
    return 0;
  };
  api.MatmulAlgoCheck = [](lt::Handle, lt::MatmulDesc, lt::Layout, lt::Layout, lt::Layout,
                           lt::Layout, const lt::Algo* algo, lt::HeuristicResult* result) {
    for (const uint64_t tile : fake.refused) {
      if (tile == algo->data[0]) return 15;
    }
    *result = {{}, algo->data[1] > 1 ? size_t{100} : size_t{0}, 0, 1.0f, {}};
    return 0;
  };
  return api;
}

// The tiles and splits that come out, as "10 20/2", with a counter as "10+".
std::string tiles(const lt::Api& api, int64_t m, int64_t k, bool vectors, std::string* why) {
  fake.a_mode = fake.b_mode = vectors ? lt::kScaleOuterVec : lt::kScaleScalar;
  const lt::Description product{nullptr, nullptr, nullptr, nullptr, nullptr,
                                nullptr, m,       k,       1000,    vectors};
  std::string text;
  for (const lt::Candidate& each : lt::find_candidates(api, product, why)) {
    if (!text.empty()) text += ' ';
    text += std::to_string(each.algo.data[0]);
    if (each.algo.data[1] > 1) text += '/' + std::to_string(each.algo.data[1]);
    EXPECT(each.name.find("tile " + std::to_string(each.algo.data[0]) + ",") != std::string::npos);
    if (each.workspace == 4) text += '+';
    EXPECT(each.workspace == (each.algo.data[1] > 1 ? 100 : text.back() == '+' ? 4 : 0));
    const std::string end = ", workspace " + std::to_string(each.workspace);
    EXPECT(each.name.rfind(end) == each.name.size() - end.size());
  }
  EXPECT(fake.a_mode == (vectors ? lt::kScaleOuterVec : lt::kScaleScalar));
  EXPECT(fake.b_mode == fake.a_mode);
  return text;
}

void test_candidates() {
  const lt::Api api = make_api();
  std::string why;
  fake = {};
  fake.offered_for_scalars = {algo(10, 3), algo(20, 2), algo(30), algo(30), algo(40, 5)};
  // First what takes no workspace, then what is safe, then what splits without its split; doubles
  // come once.
  EXPECT(tiles(api, 16, 64, false, &why) == "30 20/2 10 20 40");
  EXPECT(tiles(api, 16, 480, false, &why) == "30 10/3 20/2 40/5 10 20 40");
  fake.refused = {40};
  EXPECT(tiles(api, 16, 64, false, &why) == "30 20/2 10 20");
  fake.version = 130500;  // Repaired.
  EXPECT(tiles(api, 16, 64, false, &why) == "30 10/3 20/2 40/5 10 20");
  // The same tiles with a counter are something else.
  fake = {};
  fake.counted = {10, 30};
  fake.offered_for_scalars = {algo(10), algo(20), algo(30)};
  EXPECT(tiles(api, 16, 64, false, &why) == "10 20 30 10+ 30+");
  // Row scales: cublasLt's offer, and what it takes of those for tensor scales, unsplit.
  fake = {};
  fake.offered = {algo(50)};
  fake.offered_for_scalars = {algo(10), algo(20, 2), algo(30), algo(50), algo(60)};
  fake.refused = {30};
  EXPECT(tiles(api, 16, 64, true, &why) == "10 50 60 20");
  EXPECT(tiles(api, 4096, 64, true, &why) == "50 10 60 20");
  EXPECT(why.empty());
  // What it does not offer at all for row scales stays refused.
  fake.offered = {};
  EXPECT(tiles(api, 16, 64, true, &why) == "");
  EXPECT(why == "cublasLt 13.1.0 has no algorithm for it");
  fake.status = 7;
  EXPECT(tiles(api, 16, 64, false, &why) == "");
  EXPECT(why == "cublasLt 13.1.0 has no algorithm for it: broken");
}

// --- A race
// ---------------------------------------------------------------------------------------

// Each candidate's speed, and a device that gets slower from round to round, unevenly.
int race(const std::vector<float>& speeds, int* runs, const std::vector<int>& broken = {}) {
  Race race(static_cast<int>(speeds.size()));
  for (const int each : broken) race.drop(each);
  uint64_t random = 1;
  *runs = 0;
  for (float clock = 1.0f; !race.decided(false); clock *= 1.03f) {
    const std::vector<int> order = race.next();
    std::vector<float> times;
    for (const int each : order) {
      random = random * 6364136223846793005ull + 1442695040888963407ull;
      const float noise = 1.0f + 0.01f * static_cast<float>(random >> 40) * 0x1p-24f;
      times.push_back(speeds[each] * clock * noise);
      ++*runs;
    }
    race.add(order, times);
  }
  return race.winner();
}

void test_race() {
  int runs = 0, all = 0;
  EXPECT(race({10.0f, 9.0f, 8.0f, 11.0f}, &runs) == 2);
  EXPECT(runs < 4 * Race::kMostRounds);
  EXPECT(race({10.0f, 10.2f, 9.7f, 10.1f}, &all) == 2);
  EXPECT(race({10.0f, 10.0f, 10.0f}, &all) == 0);  // As cublasLt ranks them.
  EXPECT(race({10.4f, 10.0f, 9.96f}, &all) == 1);
  EXPECT(all == 3 * Race::kMostRounds);
  EXPECT(race({30.0f, 10.0f}, &runs) == 1);
  EXPECT(runs == 2);  // One round tells.
  EXPECT(race({5.0f, 10.0f, 12.0f}, &runs, {0}) == 1);
  EXPECT(race({10.0f}, &runs) == 0);
  EXPECT(runs == 0);
  EXPECT(race({5.0f, 6.0f}, &runs, {0, 1}) == -1);

  // A disturbance does not drop the best.
  Race disturbed(2);
  disturbed.add({0, 1}, {10.0f, 9.0f});
  disturbed.add({1, 0}, {20.0f, 10.0f});
  disturbed.add({0, 1}, {10.0f, 9.0f});
  EXPECT(disturbed.winner() == 1);

  Race timed(2);
  EXPECT(!timed.decided(true));
  for (int round = 0; round < Race::kFewestRounds; ++round) timed.add({0, 1}, {10.0f, 10.0f});
  EXPECT(timed.decided(true) && !timed.decided(false));
  // Every other round goes backwards.
  Race turns(3);
  EXPECT((turns.next() == std::vector<int>{0, 1, 2}));
  turns.add({0, 1, 2}, {1.0f, 1.0f, 1.0f});
  EXPECT((turns.next() == std::vector<int>{2, 1, 0}));
  EXPECT(turns.median(1) == 1.0f);

  Race close(5);
  for (int round = 0; round < 3; ++round) {
    const std::vector<float> times = {10.4f, 10.2f, 10.0f, 10.45f, 10.3f};
    std::vector<float> in_order;
    for (const int each : close.next()) in_order.push_back(times[each]);
    close.add(close.next(), in_order);
  }
  EXPECT((close.finalists(1.035f, 8).next() == std::vector<int>{1, 2, 4}));
  Race last = close.finalists(1.08f, 2);
  EXPECT((last.next() == std::vector<int>{1, 2}));
  last.add({1, 2}, {10.0f, 10.05f});
  EXPECT(last.winner() == 1 && last.median(1) == 10.0f);
}

}  // namespace

int main() {
  test_candidates();
  test_race();
  return wrong == 0 ? 0 : 1;
}
