#include "ffi/plan_table.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>
#include <mutex>
#include <system_error>
#include <tuple>
#include <utility>

namespace jax_fp8::lt {
namespace {

using Key = std::tuple<std::string, std::string, std::string>;

struct Table {
  std::mutex mutex;
  std::map<Key, Choice> choices;
  bool timed = true;
  std::string file;
};

Table& table() {
  static Table* const instance = new Table;
  return *instance;
}

std::atomic<int64_t> generation{0};

Key key_of(const Choice& choice) { return {choice.gpu, choice.cublaslt, choice.problem}; }

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return result + '"';
}

std::string to_line(const Choice& choice) {
  return "{\"gpu\": " + quoted(choice.gpu) + ", \"cublaslt\": " + quoted(choice.cublaslt) +
         ", \"problem\": " + quoted(choice.problem) +
         ", \"algorithm\": " + quoted(choice.algorithm) +
         ", \"candidates\": " + std::to_string(choice.candidates) +
         ", \"ns\": " + std::to_string(choice.ns) + "}\n";
}

// Adds a whole line or nothing, whatever other processes do; returns errno or 0.
int append(const std::string& file, const std::string& line) {
  std::error_code ignored;  // open says what is wrong.
  std::filesystem::create_directories(std::filesystem::path(file).parent_path(), ignored);
  const int descriptor = open(file.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (descriptor < 0) return errno;
  int error = flock(descriptor, LOCK_EX) == 0 ? 0 : errno;
  if (error == 0) {
    const off_t end = lseek(descriptor, 0, SEEK_END);
    const ssize_t written = write(descriptor, line.data(), line.size());
    if (written != static_cast<ssize_t>(line.size())) {
      error = written < 0 ? errno : ENOSPC;
      if (written > 0 && ftruncate(descriptor, end) != 0) error = errno;
    }
  }
  close(descriptor);
  return error;
}

}  // namespace

void set_choosing(bool timed, std::string file) {
  Table& all = table();
  const std::lock_guard lock(all.mutex);
  all.timed = timed;
  all.file = std::move(file);
  ++generation;
}

bool choosing_is_timed() {
  const std::lock_guard lock(table().mutex);
  return table().timed;
}

std::optional<Choice> find_choice(const Choice& wanted) {
  Table& all = table();
  const std::lock_guard lock(all.mutex);
  const auto found = all.choices.find(key_of(wanted));
  if (found == all.choices.end()) return std::nullopt;
  if (!all.timed && found->second.origin != "imported") return std::nullopt;
  return found->second;
}

Choice keep_choice(const Choice& timed) {
  Table& all = table();
  std::string file;
  {
    const std::lock_guard lock(all.mutex);
    const auto [place, added] = all.choices.emplace(key_of(timed), timed);
    if (!added && place->second.origin == "timed") return place->second;
    place->second = timed;  // One that was kept, but that cublasLt does not offer, gives way.
    file = all.file;
  }
  if (file.empty()) return timed;
  if (const int error = append(file, to_line(timed)); error != 0) {
    std::fprintf(stderr, "jax_fp8: the choices of algorithms cannot be kept in %s: %s\n",
                 file.c_str(), std::strerror(error));
    const std::lock_guard lock(all.mutex);
    if (all.file == file) all.file.clear();  // Said once.
  }
  return timed;
}

std::vector<Choice> choices() {
  Table& all = table();
  const std::lock_guard lock(all.mutex);
  std::vector<Choice> result;
  for (const auto& [key, choice] : all.choices) result.push_back(choice);
  return result;
}

void add_choices(const std::vector<Choice>& added) {
  Table& all = table();
  const std::lock_guard lock(all.mutex);
  for (const Choice& choice : added) {
    Choice& place = all.choices[key_of(choice)];
    // Of several lines of a file the last counts.
    if (choice.origin == "imported" || place.origin.empty() || place.origin == "cached") {
      place = choice;
    }
  }
  ++generation;
}

void clear_choices() {
  Table& all = table();
  const std::lock_guard lock(all.mutex);
  all.choices.clear();
  ++generation;
}

int64_t choices_generation() { return generation; }

}  // namespace jax_fp8::lt
