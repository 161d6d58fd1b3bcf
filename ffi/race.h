// Which of several candidates is the fastest, by rounds of times that are noisy.
//
// A GPU's clock follows its power and its temperature, so times that were taken apart do not
// compare. In a round every candidate that is still in it runs once, one after the other. What is
// clearly slower at its best leaves, and the rest is compared by medians. Where a clock takes long
// to settle, the last of a race run another one, of one round, in which each has it for itself.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace jax_fp8 {

class Race {
 public:
  static constexpr int kFewestRounds = 3, kMostRounds = 7;
  // Candidates as close as this cannot be told apart from one process to the next, so that the
  // first of them, which cublasLt likes best, is taken.
  static constexpr float kTie = 1.01f;

  explicit Race(int count) : times_(count) {
    for (int i = 0; i < count; ++i) running_.push_back(i);
  }

  // Those of the next round, in their order. Every other round goes backwards, so that no
  // candidate always follows the same one.
  std::vector<int> next() const {
    std::vector<int> order = running_;
    if (rounds_ % 2 == 1) std::reverse(order.begin(), order.end());
    return order;
  }

  void drop(int candidate) {
    running_.erase(std::remove(running_.begin(), running_.end(), candidate), running_.end());
  }

  // The times of `order`, which is what next() gave.
  void add(const std::vector<int>& order, const std::vector<float>& times) {
    for (size_t i = 0; i < order.size(); ++i) times_[order[i]].push_back(times[i]);
    ++rounds_;
    const float margins[] = {1.25f, 1.15f, 1.08f, 1.05f};
    float limit = least(running_[0]);
    for (const int candidate : running_) limit = std::min(limit, least(candidate));
    limit *= margins[std::min(rounds_, 4) - 1];
    running_.erase(std::remove_if(running_.begin(), running_.end(),
                                  [&](int candidate) { return least(candidate) > limit; }),
                   running_.end());
  }

  // `expired`: the time that was given to the race is over.
  bool decided(bool expired) const {
    return running_.size() <= 1 || rounds_ >= kMostRounds || (expired && rounds_ >= kFewestRounds);
  }

  // -1 where none could run.
  int winner() const {
    if (running_.empty()) return -1;
    const float limit = best() * kTie;
    return *std::find_if(running_.begin(), running_.end(),
                         [&](int candidate) { return median(candidate) <= limit; });
  }

  // A race of the fastest, up to `most`, of those that take at most `margin` times the least.
  Race finalists(float margin, size_t most) const {
    std::vector<int> found = running_;
    std::stable_sort(found.begin(), found.end(),
                     [&](int a, int b) { return median(a) < median(b); });
    while (found.size() > most || median(found.back()) > margin * best()) found.pop_back();
    std::sort(found.begin(), found.end());
    Race race(static_cast<int>(times_.size()));
    race.running_ = found;
    return race;
  }

  // Of a candidate that ran in every round so far.
  float median(int candidate) const {
    std::vector<float> sorted = times_[candidate];
    if (sorted.empty()) return 0.0f;
    std::sort(sorted.begin(), sorted.end());
    const size_t half = sorted.size() / 2;
    return sorted.size() % 2 == 1 ? sorted[half] : 0.5f * (sorted[half - 1] + sorted[half]);
  }

 private:
  float least(int candidate) const {
    return *std::min_element(times_[candidate].begin(), times_[candidate].end());
  }

  // The least of the medians of those that are in the race.
  float best() const {
    float found = median(running_[0]);
    for (const int candidate : running_) found = std::min(found, median(candidate));
    return found;
  }

  std::vector<std::vector<float>> times_;
  std::vector<int> running_;
  int rounds_ = 0;
};

}  // namespace jax_fp8
