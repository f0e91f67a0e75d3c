// Threads that share one operation's tasks, and the memory it works in. One caller at a time.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

namespace segue {

// Memory that only grows; what it held is lost when it does.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  void* take(int64_t num_bytes) {
    if (num_bytes > size_) {
      std::free(memory_);
      size_ = (num_bytes + 4095) / 4096 * 4096;
      memory_ = std::aligned_alloc(4096, size_);
      if (memory_ == nullptr) throw std::bad_alloc();
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  int64_t size_ = 0;
};

class Pool {
 public:
  using Task = void (*)(void* work, int64_t index, Scratch& scratch);

  explicit Pool(int num_threads) : scratch_(num_threads) {
    for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this, i] { serve(scratch_[i]); });
  }

  ~Pool() {
    is_closing_ = true;
    round_.fetch_add(1);
    round_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  int num_threads() const { return static_cast<int>(scratch_.size()); }

  // Memory that all tasks of an operation see.
  Scratch shared;

  // Calls work(index, scratch) for each index below num_tasks, on all threads; returns when all are done.
  template <class Work>
  void run(int64_t num_tasks, Work&& work) {
    if (threads_.empty() || num_tasks == 1) {
      for (int64_t i = 0; i < num_tasks; ++i) work(i, scratch_[0]);
      return;
    }
    work_ = &work;
    task_ = [](void* any, int64_t index, Scratch& scratch) { (*static_cast<std::remove_reference_t<Work>*>(any))(index, scratch); };
    num_tasks_ = num_tasks;
    next_.store(0, std::memory_order_relaxed);
    num_busy_.store(static_cast<int>(threads_.size()), std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    work_off(scratch_[0]);
    for (int spins = 0; num_busy_.load(std::memory_order_acquire) != 0; ++spins) {
      if (spins > kSpins) std::this_thread::yield();
    }
  }

 private:
  // About 20 microseconds: the operations of a layer follow each other faster than a thread wakes up.
  static constexpr int kSpins = 4000;

  void work_off(Scratch& scratch) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < num_tasks_;) task_(work_, i, scratch);
  }

  void serve(Scratch& scratch) {
    for (uint32_t seen = 0;;) {
      for (int spins = 0; spins < kSpins && round_.load(std::memory_order_acquire) == seen; ++spins) {
      }
      round_.wait(seen, std::memory_order_acquire);
      seen = round_.load(std::memory_order_acquire);
      if (is_closing_) return;
      work_off(scratch);
      num_busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<Scratch> scratch_;
  std::vector<std::thread> threads_;
  std::atomic<uint32_t> round_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> num_busy_{0};
  std::atomic<bool> is_closing_{false};
  void* work_ = nullptr;
  Task task_ = nullptr;
  int64_t num_tasks_ = 0;
};

}  // namespace segue
