// What the handlers ran: one entry for each distinct problem, with a count.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace jax_fp8 {

using Value = std::variant<int64_t, std::string, std::vector<int64_t>, std::vector<std::string>>;
using Entry = std::map<std::string, Value>;

void note(Entry entry);
std::vector<std::pair<Entry, int64_t>> journal();
void clear_journal();

// "tensor", "row", "(1, 128)" or "(128, 128)".
std::string granularity_name(int64_t block_rows, int64_t block_cols);

}  // namespace jax_fp8
