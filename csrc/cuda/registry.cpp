#include "registry.h"

#include <c10/util/Exception.h>

#include <deque>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

namespace lwkd::cuda {
namespace {

constexpr int kSharedMemoryWithoutAsking = 48 * 1024;

struct Registry {
  std::shared_mutex mutex;
  ImageProvider provider;
  std::deque<std::unordered_map<std::string, Function>> functions;  // by device
  std::deque<std::deque<std::unordered_map<std::string, Function>>> forgotten;
};

// Never destroyed: at the end of a process the driver may be gone before us.
Registry& registry() {
  static Registry* const loaded = new Registry;
  return *loaded;
}

const Function* find(int device, const std::string& variant) {
  Registry& all = registry();
  const std::shared_lock lock(all.mutex);
  if (device >= static_cast<int>(all.functions.size())) return nullptr;
  const auto& of_device = all.functions[device];
  const auto found = of_device.find(variant);
  return found == of_device.end() ? nullptr : &found->second;
}

Function load(const std::string& variant, int device) {
  ImageProvider provider;
  {
    const std::shared_lock lock(registry().mutex);
    provider = registry().provider;
  }
  TORCH_CHECK(provider != nullptr, "lwkd: kernel ", variant, " is asked for before lwkd was imported.");
  const Image image = provider(variant, architecture_of(device));
  TORCH_CHECK(image.warps > 0 && image.hidden >= 0 && !image.bytes.empty(), "lwkd: the image of kernel ", variant,
              " is not whole: ", image.bytes.size(), " bytes, ", image.warps, " warps, ", image.hidden,
              " hidden parameters. Delete it, so that it is made again.");
  const std::string about = "kernel " + variant + " on device " + std::to_string(device);
  Function function;
  Module module = nullptr;
  check(driver().load_module(&module, image.bytes.data()), "loading the image of " + about);
  check(driver().get_function(&function.handle, module, image.entry.c_str()),
        "finding " + image.entry + " of " + about);
  if (image.shared_memory > kSharedMemoryWithoutAsking)
    check(driver().set_function_attribute(function.handle, kMaxDynamicSharedMemory, image.shared_memory),
          "giving " + std::to_string(image.shared_memory) + " bytes of shared memory to " + about);
  function.variant = variant;
  function.parameters = image.parameters;
  function.hidden = image.hidden;
  function.shared_memory = static_cast<unsigned>(image.shared_memory);
  function.threads = 32u * static_cast<unsigned>(image.warps);
  return function;
}

}  // namespace

void set_image_provider(ImageProvider provider) {
  const std::unique_lock lock(registry().mutex);
  registry().provider = std::move(provider);
  // Kept, since a thread may be launching one of them.
  registry().forgotten.push_back(std::move(registry().functions));
  registry().functions.clear();
}

int architecture_of(int device) {
  int handle = 0, major = 0, minor = 0;
  const std::string about = "asking for the compute capability of device " + std::to_string(device);
  check(driver().get_device(&handle, device), about);
  check(driver().get_device_attribute(&major, kComputeCapabilityMajor, handle), about);
  check(driver().get_device_attribute(&minor, kComputeCapabilityMinor, handle), about);
  return 10 * major + minor;
}

const Function& function(const std::string& variant, const Place& place) {
  if (const Function* found = find(place.index(), variant)) return *found;
  TORCH_CHECK(!place.capturing(), "lwkd: kernel ", variant,
              " is not loaded yet, and loading is not allowed while a CUDA graph is captured. Run one step before the "
              "capture, or call lwkd.warmup(device).");
  // Not under the lock: the provider may compile for seconds, and waits for Python. Of two threads that load the same
  // variant, the second drops its own.
  Function loaded = load(variant, place.index());
  Registry& all = registry();
  const std::unique_lock lock(all.mutex);
  while (static_cast<int>(all.functions.size()) <= place.index()) all.functions.emplace_back();
  return all.functions[place.index()].emplace(variant, std::move(loaded)).first->second;
}

}  // namespace lwkd::cuda
