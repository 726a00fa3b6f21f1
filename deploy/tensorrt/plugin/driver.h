// The CUDA driver, opened when the first kernel is loaded: a build needs no CUDA, and a machine without a GPU can still
// load the library, register the plugin and build engines for other machines.
#pragma once
#include <cstddef>

namespace dcnv2 {

using Status = int;  // CUresult; 0 is success
using Device = int;
struct LibraryHandle;   // CUlibrary
struct KernelHandle;    // CUkernel
struct FunctionHandle;  // CUfunction

struct Driver {
  Status (*cuGetErrorString)(Status, char const **);
  Status (*cuCtxGetDevice)(Device *);
  Status (*cuDeviceGetAttribute)(int *, int attribute, Device);
  Status (*cuLibraryLoadData)(LibraryHandle **, void const *code, void *, void *, unsigned, void *, void *, unsigned);
  Status (*cuLibraryUnload)(LibraryHandle *);
  Status (*cuLibraryGetKernel)(KernelHandle **, LibraryHandle *, char const *);
  Status (*cuKernelGetFunction)(FunctionHandle **, KernelHandle *);
  Status (*cuFuncSetAttribute)(FunctionHandle *, int attribute, int value);
  Status (*cuLaunchKernel)(FunctionHandle *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared,
                           void *stream, void **parameters, void **extra);
};

constexpr int CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76;  // CUdevice_attribute
constexpr int MAX_DYNAMIC_SHARED = 8;                        // CUfunction_attribute

// The same object every time; null where there is no driver from CUDA 12 on, and then `reason` says why.
Driver const *cuda_driver(char const **reason) noexcept;

}  // namespace dcnv2
