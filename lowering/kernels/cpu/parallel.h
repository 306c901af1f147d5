// Work that is shared out in blocks between the calling thread and the threads that XLA lends.
#ifndef HIRE_PARALLEL_H_
#define HIRE_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

namespace hire {

// A pool of no threads but the calling one.
struct Alone {
  int64_t num_threads() const { return 1; }
  template <typename Task>
  void Schedule(const Task&) {}
};

// Runs fun(block) once for each of `blocks` blocks, and returns when all have run.
//
// The calling thread takes blocks as well, and waits only for blocks that another thread has begun: where the pool has
// no thread to spare, because all of them run kernels like this one, it does all the work itself. A task that comes late
// finds no block left and touches nothing but the shared state, which it owns a part of.
//
// Pool: num_threads() and Schedule(task), as xla::ffi::ThreadPool.
template <typename Pool, typename Fun>
void ForEachBlock(Pool& pool, int64_t blocks, const Fun& fun) {
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), blocks) - 1;
  if (helpers < 1) {
    for (int64_t block = 0; block < blocks; ++block) fun(block);
    return;
  }
  struct Work {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> left;
    int64_t blocks;
    const Fun* fun;
    std::mutex mutex;
    std::condition_variable done;

    void Run() {
      for (int64_t block; (block = next.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
        (*fun)(block);
        if (left.fetch_sub(1, std::memory_order_acq_rel) == 1) {
          std::lock_guard<std::mutex> lock(mutex);
          done.notify_all();
        }
      }
    }
  };
  auto work = std::make_shared<Work>();
  work->left.store(blocks, std::memory_order_relaxed);
  work->blocks = blocks;
  work->fun = &fun;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->Run(); });
  work->Run();
  // The last blocks end within microseconds of each other: look a while before going to sleep.
  for (int spin = 0; spin < 4000; ++spin) {
    if (work->left.load(std::memory_order_acquire) == 0) return;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  std::unique_lock<std::mutex> lock(work->mutex);
  work->done.wait(lock, [&] { return work->left.load(std::memory_order_acquire) == 0; });
}

}  // namespace hire

#endif  // HIRE_PARALLEL_H_
