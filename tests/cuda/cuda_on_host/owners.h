// Who wrote what: two blocks of a launch that write one element are an error, as is an element that nobody writes and a
// write to anywhere else.
#pragma once

#include <stdint.h>
#include <string.h>

#include <string>
#include <utility>
#include <vector>

#include "lanes.h"

namespace vvae {
namespace cuda {
namespace host {

class Owners {
 public:
  // `bytes` of elements of `size` bytes; an output must be written everywhere.
  void watch(const char* name, void* data, int64_t bytes, int size, bool output) {
    memset(data, 0xff, size_t(bytes));  // NaN, in every type
    std::vector<int64_t> owner(size_t(bytes / size));
    buffers_.push_back({name, static_cast<char*>(data), bytes, size, output, std::move(owner)});
  }

  void begin_launch() { first_of_launch_ += most_blocks_ + 1, most_blocks_ = 0; }

  HARNESS_FN void record(const void* address, int64_t bytes, int64_t block_index) {
    const char* at = static_cast<const char*>(address);
    for (Buffer& buffer : buffers_) {
      if (at < buffer.data || at >= buffer.data + buffer.bytes) continue;
      const int64_t offset = at - buffer.data;
      if (offset % buffer.size || bytes % buffer.size || offset + bytes > buffer.bytes)
        return fail("writes over the end of", buffer, offset / buffer.size);
      if (block_index > most_blocks_) most_blocks_ = block_index;
      for (int64_t i = offset / buffer.size; i < (offset + bytes) / buffer.size; ++i) {
        int64_t& owner = buffer.owner.data()[i];
        const int64_t us = first_of_launch_ + block_index;
        if (owner >= first_of_launch_ && owner != us) fail("two blocks write", buffer, i);
        owner = us;
      }
      return;
    }
    if (error_.empty()) error_ = std::string(kernel_name) + ": a store outside of the outputs";
  }

  // What went wrong since the last call, if anything; forgets the buffers.
  std::string finish() {
    for (const Buffer& buffer : buffers_) {
      if (!buffer.output) continue;
      int64_t missing = 0, first = 0;
      for (int64_t i = int64_t(buffer.owner.size()); i-- > 0;)
        if (buffer.owner[size_t(i)] == 0) ++missing, first = i;
      if (missing)
        error_ += (error_.empty() ? "" : "\n") + std::to_string(missing) + " elements of " + buffer.name +
                  " are never written, the first is " + std::to_string(first);
    }
    std::string error;
    std::swap(error, error_);
    buffers_.clear();
    return error;
  }

 private:
  struct Buffer {
    const char* name;
    char* data;
    int64_t bytes;
    int size;
    bool output;
    std::vector<int64_t> owner;  // first_of_launch_ of the launch + the block; 0 where none is
  };

  HARNESS_FN void fail(const char* what, const Buffer& buffer, int64_t element) {
    if (error_.empty())
      error_ = std::string(kernel_name) + ": " + what + " " + buffer.name + "[" + std::to_string(element) + "]";
  }

  std::vector<Buffer> buffers_;
  std::string error_;
  int64_t first_of_launch_ = 1, most_blocks_ = 0;
};

inline Owners owners;

inline void record_store(const void* address, size_t bytes) {
  owners.record(address, int64_t(bytes), block.index());
}

}  // namespace host
}  // namespace cuda
}  // namespace vvae
