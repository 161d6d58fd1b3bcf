// The algorithms that were chosen for cublasLt's problems: in the process, and in a file that later
// processes start with.
//
// Python reads the file and gives its lines to add_choices; a choice made here is appended to it at
// once, so that a process that is killed loses none.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace jax_fp8::lt {

struct Choice {
  std::string gpu;        // Its model and the number of its SMs.
  std::string cublaslt;   // The version.
  std::string problem;    // All that a plan depends on but the device's ordinal.
  std::string algorithm;  // The configuration, which is looked for among what cublasLt offers.
  int64_t candidates = 0;
  int64_t ns = 0;      // That it took when it was timed.
  std::string origin;  // "timed" in this process, "cached" by an earlier one, or "imported".
};

// With `timed`, problems without a choice are timed, and choices are appended to `file` unless its
// name is empty. Without, only imported choices count.
void set_choosing(bool timed, std::string file);
bool choosing_is_timed();

// What was chosen for the problem of `wanted`.
std::optional<Choice> find_choice(const Choice& wanted);

// Keeps one that was timed and returns the one that stands: of two threads that time the same
// problem, on equal devices, the first to come here decides.
Choice keep_choice(const Choice& timed);

std::vector<Choice> choices();
// Imported ones take the place of others; cached ones do not.
void add_choices(const std::vector<Choice>& added);
void clear_choices();

// Rises with every change but a timing: plans of before are made again when they are next met.
int64_t choices_generation();

}  // namespace jax_fp8::lt
