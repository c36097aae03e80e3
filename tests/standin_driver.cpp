// A stand-in for the CUDA driver library: it records what is launched and hands it to a callback, which may run it.
// An image is text here: the variant's name, then the byte size of each parameter, "name\n8 8 4 8 8".

#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

extern "C" {

struct Launch {
  const char* variant;
  uint32_t grid[3], block[3], shared;
  int32_t device, parameters;
  uint64_t stream;
  int32_t sizes[32];
  uint8_t bytes[256];  // of the parameters, one behind the other, each at a multiple of its size
};

typedef int (*Executor)(const Launch*);
}

namespace {

struct Loaded {
  std::string variant;
  std::vector<int> sizes;
  int device;
  int shared = 48 * 1024;
};

std::mutex mutex;
std::deque<Loaded> modules;
std::deque<Launch> launches;
std::deque<std::string> calls;
Executor executor = nullptr;
std::string failing;
int failure = 0, capturing = 0, captured_elsewhere = 0;
bool recording = true;
std::vector<std::pair<uint64_t, uint64_t>> allocated;  // begin and end
thread_local uint64_t context = 0;
thread_local int capture_mode = 0;

constexpr uint64_t kContexts = 0x1000;
constexpr int kRelaxed = 2;

pid_t initialised_by = 0;

// Records a call, and returns what it is to answer: as the real driver, nothing works in a child of who initialised it.
int called(const char* name) {
  if (initialised_by != 0 && initialised_by != getpid()) return 3;
  if (!recording) return 0;
  const std::lock_guard lock(mutex);
  calls.push_back(name);
  return name == failing ? failure : 0;
}

}  // namespace

extern "C" {

// Control

void standin_set_executor(Executor run) { executor = run; }
void standin_fail(const char* name, int result) {
  failing = name;
  failure = result;
}
void standin_set_recording(int on) { recording = on != 0; }
void standin_set_capturing(int status) { capturing = status; }
void standin_drop_context() { context = 0; }
int standin_capturing() { return capturing; }
void standin_set_captured_elsewhere(int on) { captured_elsewhere = on; }
// Whether an address lies in memory that the driver was asked for.
int standin_owns(uint64_t address) {
  const std::lock_guard lock(mutex);
  for (const auto& [begin, end] : allocated)
    if (begin <= address && address < end) return 1;
  return 0;
}
int standin_launches() { return static_cast<int>(launches.size()); }
const Launch* standin_launch(int index) { return &launches[index]; }
int standin_calls(const char* name) {
  int count = 0;
  for (const std::string& call : calls) count += call == name;
  return count;
}
void standin_clear() {
  launches.clear();
  calls.clear();
}

// The driver

int cuInit(unsigned) {
  const int result = called("cuInit");
  if (result == 0) initialised_by = getpid();
  return result;
}
int cuGetErrorName(int result, const char** name) {
  *name = result == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_STAND_IN";
  return 0;
}
int cuGetErrorString(int, const char** text) {
  *text = "the stand-in was told to fail";
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return called("cuDeviceGet");
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? 9 : 0;
  return called("cuDeviceGetAttribute");
}
int cuCtxGetCurrent(void** current) {
  *current = reinterpret_cast<void*>(context);
  return called("cuCtxGetCurrent");
}
int cuCtxSetCurrent(void* wanted) {
  context = reinterpret_cast<uint64_t>(wanted);
  return called("cuCtxSetCurrent");
}
int cuDevicePrimaryCtxRetain(void** retained, int device) {
  *retained = reinterpret_cast<void*>(kContexts + static_cast<uint64_t>(device));
  return called("cuDevicePrimaryCtxRetain");
}
int cuModuleLoadData(void** module, const void* image) {
  const int result = called("cuModuleLoadData");
  if (result != 0) return result;
  std::istringstream text(static_cast<const char*>(image));
  const std::lock_guard lock(mutex);
  Loaded& loaded = modules.emplace_back();
  std::getline(text, loaded.variant);
  for (int size; text >> size;) loaded.sizes.push_back(size);
  loaded.device = static_cast<int>(context - kContexts);
  *module = &loaded;
  return 0;
}
int cuModuleGetFunction(void** function, void* module, const char*) {
  *function = module;
  return called("cuModuleGetFunction");
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute == 8) static_cast<Loaded*>(function)->shared = value;
  return called("cuFuncSetAttribute");
}
// Memory as a GPU's: what nobody has written is no zero.
int cuMemAlloc_v2(unsigned long long* pointer, size_t bytes) {
  const int result = called("cuMemAlloc_v2");
  if (result != 0) return result;
  if ((capturing != 0 || captured_elsewhere != 0) && capture_mode != kRelaxed) return 900;
  void* memory = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
  std::memset(memory, 0x7B, bytes);
  *pointer = reinterpret_cast<uint64_t>(memory);
  const std::lock_guard lock(mutex);
  allocated.emplace_back(*pointer, *pointer + bytes);
  return 0;
}
int cuThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(*mode, capture_mode);
  return called("cuThreadExchangeStreamCaptureMode");
}
int cuStreamIsCapturing(void*, int* status) {
  *status = capturing;
  return called("cuStreamIsCapturing");
}
int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** parameters, void**) {
  const int result = called("cuLaunchKernel");
  if (result != 0) return result;
  if (!recording) return 0;  // what is left is the caller's own time
  const Loaded& kernel = *static_cast<Loaded*>(function);
  if (context != kContexts + static_cast<uint64_t>(kernel.device)) return 201;  // of another context
  if (static_cast<int>(shared) > kernel.shared) return 1;
  Launch launch = {kernel.variant.c_str(), {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared};
  launch.device = kernel.device;
  launch.stream = reinterpret_cast<uint64_t>(stream);
  size_t offset = 0;
  for (size_t i = 0; i < kernel.sizes.size(); ++i) {
    const size_t size = static_cast<size_t>(kernel.sizes[i]);
    offset = (offset + size - 1) / size * size;
    std::memcpy(launch.bytes + offset, parameters[i], size);
    launch.sizes[launch.parameters++] = kernel.sizes[i];
    offset += size;
  }
  const Launch* recorded;
  {
    const std::lock_guard lock(mutex);
    recorded = &launches.emplace_back(launch);
  }
  return executor == nullptr ? 0 : executor(recorded);
}
}
