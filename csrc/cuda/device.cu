// What can run the kernels of this library: a GPU that is new enough, or else the CPU.
#include <cstdio>

#include "launch.cuh"

ds::Interpret ds::interpret = ds::kOff;

// Tells code of another version that this library is not its own.
EXPORT int ds_cuda_interface() { return DS_INTERFACE; }

// Makes the kernels run on the CPU, on memory of the CPU, one thread after another, from the first
// to the last (1) or from the last to the first (2), or on a GPU again (0): for tests. The order
// shows where a phase reads what it writes.
EXPORT void ds_cuda_interpret(int order) { ds::interpret = static_cast<ds::Interpret>(order); }

// Returns null, or why not all GPUs here run kernels that need this compute capability, such as 90,
// and so many bytes of shared memory a block. The text is valid until the next call of the thread.
EXPORT const char* ds_cuda_unavailable(int capability, int shared) {
  static thread_local char text[200];
  if (ds::interpret != ds::kOff) return nullptr;
  int driver = 0, devices = 0;
  if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) return "there is no CUDA driver";
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) {
    cudaGetLastError();  // it would be reported again, by the next launch
    return cudaGetErrorString(error);
  }
  for (int device = 0; device < devices; ++device) {
    int major = 0, minor = 0, room = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    const cudaError_t asked = cudaGetLastError();
    if (asked != cudaSuccess) return cudaGetErrorString(asked);
    if (10 * major + minor < capability) {
      std::snprintf(text, sizeof text, "it needs sm_%d, and GPU %d is sm_%d%d", capability, device,
                    major, minor);
      return text;
    }
    if (room < shared) {
      std::snprintf(text, sizeof text,
                    "it needs %d bytes of shared memory a block, and GPU %d has %d", shared, device,
                    room);
      return text;
    }
  }
  return nullptr;
}
