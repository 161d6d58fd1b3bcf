#include "ffi/journal.h"

#include <mutex>

namespace jax_fp8 {
namespace {

std::mutex mutex;
std::map<Entry, int64_t>& entries() {
  static std::map<Entry, int64_t> all;
  return all;
}

}  // namespace

void note(Entry entry) {
  const std::lock_guard lock(mutex);
  ++entries()[std::move(entry)];
}

std::vector<std::pair<Entry, int64_t>> journal() {
  const std::lock_guard lock(mutex);
  return {entries().begin(), entries().end()};
}

void clear_journal() {
  const std::lock_guard lock(mutex);
  entries().clear();
}

std::string granularity_name(int64_t block_rows, int64_t block_cols) {
  if (block_rows == 0) return "tensor";
  if (block_cols == 0) return "row";
  return "(" + std::to_string(block_rows) + ", " + std::to_string(block_cols) + ")";
}

}  // namespace jax_fp8
