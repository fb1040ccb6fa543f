// Vectors whose memory lies between two pages that must not be touched: a read or write outside of
// it ends the program, whatever compiled the code that does it.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

template <class T>
struct GuardedAllocator {
  typedef T value_type;
  GuardedAllocator() = default;
  template <class U>
  GuardedAllocator(const GuardedAllocator<U>&) {}

  static std::size_t page_size() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }
  static std::size_t whole_pages(std::size_t count) {
    return (count * sizeof(T) + page_size() - 1) / page_size() * page_size();
  }

  T* allocate(std::size_t count) {
    const std::size_t page = page_size(), usable = whole_pages(count);
    void* const mapped =
        mmap(nullptr, usable + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char* const first = static_cast<char*>(mapped) + page;
    if (mapped == MAP_FAILED || mprotect(first, usable, PROT_READ | PROT_WRITE) != 0) {
      throw std::bad_alloc();
    }
    // By turns at the end of the pages, where the first byte behind is caught, and at their
    // beginning, where the first byte before is. The latter is also where a cache line begins, as
    // torch's memory does: results may then go past the caches.
    static bool at_end = false;
    at_end = !at_end;
    return reinterpret_cast<T*>(at_end ? first + usable - count * sizeof(T) : first);
  }
  void deallocate(T* memory, std::size_t count) {
    const uintptr_t page = page_size();
    const uintptr_t first = reinterpret_cast<uintptr_t>(memory) / page * page;
    munmap(reinterpret_cast<void*>(first - page), whole_pages(count) + 2 * page);
  }
  bool operator==(const GuardedAllocator&) const { return true; }
  bool operator!=(const GuardedAllocator&) const { return false; }
};

template <class T>
using Guarded = std::vector<T, GuardedAllocator<T>>;
