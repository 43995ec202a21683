// For LD_PRELOAD: while `guard_pages(side)` is on, every allocation of the process lies flush
// against a page that nobody may touch, and freed memory is never seen again. One thread.
#include <errno.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);
}

namespace {

constexpr size_t kPage = 4096, kReserved = size_t{1} << 40, kLeast = 256;
enum Side { kOff, kEnd, kStart };
thread_local Side side = kOff;  // the thread that asked, and no other
char* arena = nullptr;
char* next = nullptr;

bool guarded(void* p) {
    return arena && arena <= p && p < arena + kReserved;
}

// [size of the pages][size] stand in a page of their own before those that may be written; an
// unreadable one is on each side of both.
struct Header {
    size_t pages, size;
};

Header* header(void* p) {
    // from the first page that may be written: the header's and an unreadable one precede it
    uintptr_t page = reinterpret_cast<uintptr_t>(p) & ~(kPage - 1);
    // an end-flush block begins within its first page, so this is the first one
    return reinterpret_cast<Header*>(page - 2 * kPage);
}

void* allocate(size_t size, size_t alignment) {
    const size_t pages = (size + kPage - 1) / kPage * kPage + (size == 0 ? kPage : 0);
    char* head = next + kPage;
    char* first = head + 2 * kPage;
    next = first + pages;
    if (next + kPage > arena + kReserved || mprotect(head, kPage, PROT_READ | PROT_WRITE) != 0 ||
        mprotect(first, pages, PROT_READ | PROT_WRITE) != 0)
        return nullptr;
    *reinterpret_cast<Header*>(head) = {pages, size};
    std::memset(first, 0xFF, pages);  // NaN
    if (side == kStart) return first;
    const size_t at = (pages - size) / alignment * alignment;
    return first + (at < kPage ? at : kPage - alignment);
}

void release(void* p) {
    Header* h = header(p);
    char* first = reinterpret_cast<char*>(h) + 2 * kPage;
    const size_t pages = h->pages;
    char* head = reinterpret_cast<char*>(h);
    mprotect(head, first + pages - head, PROT_NONE);
    madvise(head, first + pages - head, MADV_DONTNEED);
}

}  // namespace

extern "C" {

void guard_pages(int on) {
    if (!arena) {
        void* p =
            mmap(nullptr, kReserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) __builtin_trap();
        arena = next = static_cast<char*>(p);
    }
    side = static_cast<Side>(on);
}

// C++ objects may rely on 16 bytes; small ones are not arrays that kernels walk.
void* malloc(size_t size) {
    return side && size >= kLeast ? allocate(size, 16) : __libc_malloc(size);
}

void free(void* p) {
    guarded(p) ? release(p) : __libc_free(p);
}

void* calloc(size_t count, size_t size) {
    return __libc_calloc(count, size);
}

void* realloc(void* p, size_t size) {
    if (!guarded(p)) return __libc_realloc(p, size);
    void* moved = malloc(size);
    if (moved) {
        const size_t held = header(p)->size;
        std::memcpy(moved, p, held < size ? held : size);
        free(p);
    }
    return moved;
}

// What torch asks for tensors, and kernels for scratch: no more than 4 bytes of alignment are left,
// or 1 for tensors of bytes, as in a tensor over foreign memory.
void* memalign(size_t alignment, size_t size) {
    return side ? allocate(size, size % 4 ? 1 : 4) : __libc_memalign(alignment, size);
}
void* aligned_alloc(size_t alignment, size_t size) {
    return memalign(alignment, size);
}
int posix_memalign(void** p, size_t alignment, size_t size) {
    *p = memalign(alignment, size);
    return *p ? 0 : ENOMEM;
}

}  // extern "C"
