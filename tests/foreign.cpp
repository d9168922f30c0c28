// Calls functions of a library for a process on another processor (tests/foreign.py): qemu runs it.
//
//     runner LIBRARY MEMORY BYTES
//
// MEMORY is the number of a file that both processes map. Its address here is written to standard
// output. Each Call on standard input is answered by what the function returned.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <utility>

namespace {

struct Call {
  char name[64];
  int64_t whole[24];
  double real;
};

void require(bool done, const char* what) {
  if (done) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

// Numbers and addresses go to registers of their own, and then, 8 bytes each, to the stack; floats
// have others. A function takes the first of each kind, and its caller cleans up.
template <size_t... kIndices>
int64_t call(void* function, const Call& c, std::index_sequence<kIndices...>) {
  using Function = int64_t (*)(decltype(c.whole[kIndices] + 0)..., double);
  return reinterpret_cast<Function>(function)(c.whole[kIndices]..., c.real);
}

void answer(int64_t value) {
  require(write(STDOUT_FILENO, &value, sizeof value) == sizeof value, "nobody reads");
}

}  // namespace

int main(int count, char** arguments) {
  require(count == 4, "takes LIBRARY MEMORY BYTES");
  void* library = dlopen(arguments[1], RTLD_NOW);
  require(library != nullptr, library ? "" : dlerror());
  const int64_t bytes = std::atoll(arguments[3]);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, std::atoi(arguments[2]), 0);
  require(memory != MAP_FAILED, "no memory to share");
  answer(reinterpret_cast<int64_t>(memory));
  Call c;
  while (std::fread(&c, sizeof c, 1, stdin) == 1) {
    void* function = dlsym(library, c.name);
    require(function != nullptr, "no such function");
    answer(call(function, c, std::make_index_sequence<24>()));
  }
}
