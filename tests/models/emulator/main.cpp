// One kernel as a shared library: compiled with -D EMULATE -D SOURCE='"file.cu"' -D ENTRY=name and the kernel's own constants.
#include SOURCE

static Args arguments;

extern "C" int shared_bytes() { return sizeof(Shared); }

extern "C" int launch(const void *args, int blocks_x, int blocks_y) {
  if (sizeof memory < sizeof(Shared)) return 1;
  memcpy(&arguments, args, sizeof arguments);
  gridDim = Index{blocks_x, blocks_y};
  for (blockIdx.y = 0; blockIdx.y < blocks_y; blockIdx.y++)
    for (blockIdx.x = 0; blockIdx.x < blocks_x; blockIdx.x++) {
      memset(memory, 0xff, sizeof memory);  // NaN: what was not written shows
      fibers::run_block(LAUNCH_THREADS, [] { ENTRY(arguments); });
    }
  return 0;
}
