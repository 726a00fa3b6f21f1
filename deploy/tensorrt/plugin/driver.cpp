#include "driver.h"

#include <dlfcn.h>

namespace dcnv2 {
namespace {

struct Opened {
  Driver driver{};
  char const *reason = nullptr;

  Opened() noexcept {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) {
      reason = "there is no CUDA driver (libcuda.so.1) here";
      return;
    }
    find(library, "cuGetErrorString", driver.cuGetErrorString);
    find(library, "cuCtxGetDevice", driver.cuCtxGetDevice);
    find(library, "cuDeviceGetAttribute", driver.cuDeviceGetAttribute);
    find(library, "cuLibraryLoadData", driver.cuLibraryLoadData);
    find(library, "cuLibraryUnload", driver.cuLibraryUnload);
    find(library, "cuLibraryGetKernel", driver.cuLibraryGetKernel);
    find(library, "cuKernelGetFunction", driver.cuKernelGetFunction);
    find(library, "cuFuncSetAttribute", driver.cuFuncSetAttribute);
    find(library, "cuLaunchKernel", driver.cuLaunchKernel);
  }

  template <class Function>
  void find(void *library, char const *name, Function &function) noexcept {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (!function) reason = "the CUDA driver is older than CUDA 12";
  }
};

}  // namespace

Driver const *cuda_driver(char const **reason) noexcept {
  static Opened const opened;
  *reason = opened.reason;
  return opened.reason ? nullptr : &opened.driver;
}

}  // namespace dcnv2
