// A CUDA that computes nothing: one H100 on a machine without a GPU.
//
// Preloaded, this library answers in place of cudart, cublas, cublasLt, cudnn and the driver:
//
//   memory      device memory is memory of the host, zero until somebody writes to it; copies are real
//   kernels     are counted and do nothing; so are matrix products and convolutions
//   capture     what CUDA forbids while a stream is captured is an error here too
//   the log     one line per event, in order: "kind <tab> text"
//
// Kinds: kernel, product, convolution, copy, memset, sync, capture, graph; where, note (written by Python); and what
// must never happen: bad-grid, violation. Functions that are not in this file succeed and do nothing: nullcuda.py
// generates them. What the log cannot say is whether a number is right and how long a kernel takes.
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cudnn_version.h>
#include <dlfcn.h>
#include <pthread.h>
#include <search.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

// ---- The log -------------------------------------------------------------------------------------------------------

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static FILE *log_stream;
static char *log_text;
static size_t log_size;
static void (*on_wait)(void);  // Python's: writes down the line that waits
static long torch_kernels;

static void event(const char *kind, const char *format, ...) {
  pthread_mutex_lock(&lock);
  if (log_stream) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(log_stream, "%s\t", kind);
    vfprintf(log_stream, format, arguments);
    fputc('\n', log_stream);
    va_end(arguments);
  }
  pthread_mutex_unlock(&lock);
}

static void waits(const char *kind, const char *what) {
  event(kind, "%s", what);
  if (log_stream && on_wait) on_wait();
}

void nullcuda_start(void (*hook)(void)) {
  free(log_text);
  on_wait = hook;
  log_stream = open_memstream(&log_text, &log_size);
}

const char *nullcuda_stop(void) {
  pthread_mutex_lock(&lock);
  fclose(log_stream);
  log_stream = NULL;
  pthread_mutex_unlock(&lock);
  return log_text;
}

void nullcuda_note(const char *kind, const char *text) { event(kind, "%s", text); }
long nullcuda_torch_kernels(void) { return torch_kernels; }

// ---- Capture: one stream at a time; waiting for another stream meanwhile is allowed ---------------------------------

static int capturing, nodes;
static cudaStream_t captured;
static cudaError_t last_error;
static uintptr_t last_handle = 4096;

static void *new_handle(void) { return (void *)__sync_add_and_fetch(&last_handle, 16); }
static cudaError_t fail(cudaError_t error) { return last_error = error; }
static void node(void) { nodes += capturing; }

static int forbidden(const char *what) {
  if (capturing) waits("violation", what);
  return capturing;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  capturing = 1, nodes = 0, captured = stream;
  event("capture", "begin");
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  capturing = 0, *graph = new_handle();
  event("capture", "end %d", nodes);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = capturing && stream == captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *count) {
  if (id) *id = 1;
  if (graph) *graph = (cudaGraph_t)16;
  if (dependencies) *dependencies = NULL;
  if (edges) *edges = NULL;
  if (count) *count = 0;
  return cudaStreamIsCapturing(stream, status);
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *list, size_t *count) { return *count = nodes, 0; }

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
  return *made = new_handle(), cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) { return event("graph", "launch"), 0; }
cudaError_t cudaUserObjectCreate(cudaUserObject_t *made, void *p, cudaHostFn_t f, unsigned count, unsigned flags) {
  return *made = new_handle(), cudaSuccess;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return *status = capturing && stream == captured, 0;
}

// ---- Memory --------------------------------------------------------------------------------------------------------

enum place { PAGEABLE, PINNED, DEVICE };
struct range { char *begin; size_t size; enum place place; };
static struct range ranges[1 << 16];
static int range_count;
static size_t device_used;
static const size_t DEVICE_BYTES = (size_t)79 << 30;
static const size_t LARGE = 1 << 20;  // copies and fills inside the device above this size would only cost time

static void remember(void *begin, size_t size, enum place place) {
  pthread_mutex_lock(&lock);
  ranges[range_count++] = (struct range){begin, size, place};
  if (place == DEVICE) device_used += size;
  pthread_mutex_unlock(&lock);
}

static void forget(void *begin, int unmap) {
  pthread_mutex_lock(&lock);
  for (int i = 0; i < range_count; i++) {
    if (ranges[i].begin != begin) continue;
    if (ranges[i].place == DEVICE) device_used -= ranges[i].size;
    if (unmap) munmap(begin, ranges[i].size);
    ranges[i] = ranges[--range_count];
    break;
  }
  pthread_mutex_unlock(&lock);
}

static enum place place_of(const void *p) {
  enum place found = PAGEABLE;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < range_count && !found; i++)
    if ((char *)p >= ranges[i].begin && (char *)p < ranges[i].begin + ranges[i].size) found = ranges[i].place;
  pthread_mutex_unlock(&lock);
  return found;
}

static cudaError_t allocate(void **p, size_t size, enum place place) {
  size += !size;
  if (place == DEVICE && device_used + size > DEVICE_BYTES) return fail(cudaErrorMemoryAllocation);
  // Reserved, not taken: a page that nobody touches costs nothing.
  *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*p == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  return remember(*p, size, place), cudaSuccess;
}

cudaError_t cudaMalloc(void **p, size_t size) { return allocate(p, size, DEVICE); }
cudaError_t cudaFree(void *p) { return forget(p, 1), cudaSuccess; }
cudaError_t cudaFreeHost(void *p) { return forget(p, 1), cudaSuccess; }
cudaError_t cudaHostRegister(void *p, size_t size, unsigned flags) { return remember(p, size, PINNED), cudaSuccess; }
cudaError_t cudaHostUnregister(void *p) { return forget(p, 0), cudaSuccess; }
cudaError_t cudaHostAlloc(void **p, size_t size, unsigned flags) {
  return forbidden("cudaHostAlloc") ? fail(cudaErrorStreamCaptureUnsupported) : allocate(p, size, PINNED);
}

cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
  return *total = DEVICE_BYTES, *unused = DEVICE_BYTES - device_used, cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *p) {
  static const enum cudaMemoryType types[] = {cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice};
  memset(found, 0, sizeof *found);
  found->type = types[place_of(p)], found->devicePointer = (void *)p;
  return cudaSuccess;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute name, CUdeviceptr p) { return *(CUdeviceptr *)value = p, 0; }

static cudaError_t copy(void *to, const void *from, size_t size, int synchronous) {
  static const char *names[] = {"pageable", "pinned", "device"};
  enum place target = place_of(to), source = place_of(from);
  char what[64];
  snprintf(what, sizeof what, "%s to %s %zu", names[source], names[target], size);
  // Pageable memory is copied by way of a pinned buffer: the call waits for it.
  int wait = synchronous || (target != source && (target == PAGEABLE || source == PAGEABLE));
  if (wait && forbidden(what)) return fail(cudaErrorStreamCaptureUnsupported);
  if (size <= LARGE || target != DEVICE || source != DEVICE) memmove(to, from, size);
  if (wait) waits("sync", what);
  event("copy", "%s", what);
  return node(), cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind k) { return copy(to, from, size, 1); }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind k, cudaStream_t s) {
  if (!capturing || s == captured) return copy(to, from, size, 0);
  capturing = 0;  // another stream's copies are not part of what is captured
  cudaError_t error = copy(to, from, size, 0);
  return capturing = 1, error;
}

cudaError_t cudaMemset(void *p, int value, size_t size) {
  if (size <= LARGE) memset(p, value, size);
  event("memset", "%zu", size);
  return node(), cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t size, cudaStream_t s) { return cudaMemset(p, value, size); }
cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) {
  static char memory[1 << 16];
  return *p = memory, cudaSuccess;
}

// ---- Streams and events --------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { return *s = new_handle(), cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) { return *s = new_handle(), cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *most) { return *least = 0, *most = -5, cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { return *e = new_handle(), cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { return *e = new_handle(), cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { return *ms = 1, cudaSuccess; }
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t function, void *data) { return function(data), cudaSuccess; }
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t function, void *data, unsigned flags) {
  return function(s, cudaSuccess, data), cudaSuccess;
}

static cudaError_t synchronize(const char *what) {
  if (forbidden(what)) return fail(cudaErrorStreamCaptureUnsupported);
  return waits("sync", what), cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  return capturing && s != captured ? (waits("sync", "another stream"), cudaSuccess) : synchronize("stream");
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) { return synchronize("event"); }
cudaError_t cudaDeviceSynchronize(void) { return synchronize("device"); }

// ---- The device ----------------------------------------------------------------------------------------------------

static const struct cudaDeviceProp H100 = {
    .name = "NVIDIA H100 80GB HBM3", .totalGlobalMem = (size_t)79 << 30, .major = 9, .minor = 0, .multiProcessorCount = 132,
    .warpSize = 32, .maxThreadsPerBlock = 1024, .maxThreadsDim = {1024, 1024, 64}, .maxGridSize = {2147483647, 65535, 65535},
    .maxThreadsPerMultiProcessor = 2048, .maxBlocksPerMultiProcessor = 32, .regsPerBlock = 65536,
    .regsPerMultiprocessor = 65536, .sharedMemPerBlock = 49152, .sharedMemPerBlockOptin = 232448,
    .sharedMemPerMultiprocessor = 233472, .reservedSharedMemPerBlock = 1024, .l2CacheSize = 50 << 20, .memoryBusWidth = 5120,
    .textureAlignment = 512, .texturePitchAlignment = 32, .concurrentKernels = 1, .unifiedAddressing = 1, .cooperativeLaunch = 1};

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) { return *p = H100, cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr name, int device) {
  switch ((int)name) {  // the driver's attributes have the same numbers
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *value = 64; break;
    case cudaDevAttrMaxGridDimX: *value = H100.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = H100.maxGridSize[1]; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = H100.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = H100.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = H100.sharedMemPerMultiprocessor; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = H100.reservedSharedMemPerBlock; break;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = H100.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMultiProcessorCount: *value = H100.multiProcessorCount; break;
    case cudaDevAttrComputeCapabilityMajor: *value = H100.major; break;
    case cudaDevAttrClockRate: *value = 1980000; break;
    case cudaDevAttrMemoryClockRate: *value = 2619000; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = H100.memoryBusWidth; break;
    case cudaDevAttrL2CacheSize: *value = H100.l2CacheSize; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute name, CUdevice d) { return cudaDeviceGetAttribute(value, name, d); }
cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int d) { return strncpy(text, "0000:00:00.0", size), cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return last_error; }
cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  return last_error = cudaSuccess, error;
}
const char *cudaGetErrorName(cudaError_t error) { return error ? "nullcuda" : "cudaSuccess"; }
const char *cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorStreamCaptureUnsupported) return "operation not permitted when stream is capturing";
  return error == cudaErrorMemoryAllocation ? "out of memory" : error ? "an error of nullcuda" : "no error";
}

CUresult cuDriverGetVersion(int *version) { return *version = CUDART_VERSION, 0; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = 0, 0; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, 0; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)16, 0; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = (CUcontext)16, 0; }
CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *flags, int *active) { return *flags = 0, *active = 1, 0; }
CUresult cuGetErrorString(CUresult error, const char **text) { return *text = "an error of nullcuda", 0; }

static int succeed(void) { return 0; }
static void *function(const char *name) {
  void *found = dlsym(RTLD_DEFAULT, name);
  return found ? found : (void *)succeed;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **found, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  if (result) *result = cudaDriverEntryPointSuccess;
  return *found = function(name), cudaSuccess;
}
CUresult cuGetProcAddress_v2(const char *name, void **found, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *r) {
  if (r) *r = CU_GET_PROC_ADDRESS_SUCCESS;
  return *found = function(name), 0;
}

// ---- Kernels -------------------------------------------------------------------------------------------------------

static int launch(const char *origin, const char *name, dim3 grid) {
  int possible = grid.x && grid.y && grid.z && grid.y <= 65535 && grid.z <= 65535;
  event(possible ? "kernel" : "bad-grid", "%s:%s %u,%u,%u", origin, name, grid.x, grid.y, grid.z);
  return node(), possible ? cudaSuccess : cudaErrorInvalidConfiguration;
}

// torch's: a program registers its kernels when it is loaded, by the address of a function of the host.
struct kernel { const void *address; const char *name; };
static void *kernels;
static int by_address(const void *a, const void *b) {
  const char *p = ((struct kernel *)a)->address, *q = ((struct kernel *)b)->address;
  return (p > q) - (p < q);
}
void **__cudaRegisterFatBinary(void *binary) {
  static void *handle;
  return &handle;
}
void __cudaRegisterFunction(void **h, const char *host, char *device, const char *name, int limit, void *a, void *b, void *c,
                            void *d, int *e) {
  struct kernel *made = malloc(sizeof *made);
  *made = (struct kernel){host, name};
  tsearch(made, &kernels, by_address);
}
static int launch_torch(const void *address, dim3 grid) {
  struct kernel **found = tfind(&(struct kernel){address}, &kernels, by_address);
  torch_kernels++;
  int error = launch("torch", found ? (*found)->name : "?", grid);
  return error ? fail(error) : cudaSuccess;
}
static __thread struct { dim3 grid, block; size_t shared; void *stream; } configuration;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  configuration.grid = grid, configuration.block = block, configuration.shared = shared, configuration.stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
  return *(void **)stream = configuration.stream, cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *address) { return *kernel = (cudaKernel_t)address, 0; }
cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3 grid, dim3 block, void **a, size_t m, cudaStream_t s) {
  return launch_torch(k, grid);
}
cudaError_t cudaLaunchKernel(const void *k, dim3 grid, dim3 block, void **a, size_t m, cudaStream_t s) {
  return launch_torch(k, grid);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *k, void **a) { return launch_torch(k, c->gridDim); }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *k) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024, found->numRegs = 32, found->binaryVersion = found->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *k, int b, size_t m, unsigned f) {
  return *blocks = 2, cudaSuccess;
}

// Triton's: a function of a module is its name.
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = new_handle(), 0; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) { return *f = (CUfunction)strdup(name), 0; }
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction f, const CUlaunchConfig *c) { return *clusters = 1, 0; }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute name, CUfunction f) {
  *value = name == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : name == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return 0;
}
CUresult cuLaunchKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz, unsigned m,
                        CUstream s, void **arguments, void **extra) {
  return launch("triton", (char *)f, (dim3){x, y, z});
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **arguments, void **extra) {
  return launch("triton", (char *)f, (dim3){c->gridDimX, c->gridDimY, c->gridDimZ});
}


// ---- cublas: enumerations are int, handles are pointers ------------------------------------------------------------

enum { CUDA_R_32F_ = 0, CUDA_R_64F_ = 1 };
static int size_of(int type) { return type == CUDA_R_32F_ ? 4 : type == CUDA_R_64F_ ? 8 : 2; }
static int alignment(const void *p) { return (uintptr_t)p % 16 ? (uintptr_t)p & -(uintptr_t)p : 16; }

static int product(long m, long n, long k, const void *a, const void *b, const void *c, int type, int batch) {
  int aligned = alignment(a) < alignment(b) ? alignment(a) : alignment(b);
  aligned = aligned < alignment(c) ? aligned : alignment(c);
  event("product", "m %ld n %ld k %ld align %d bytes %d batch %d", m, n, k, aligned, size_of(type), batch);
  return node(), 0;
}

int cublasCreate_v2(void **handle) { return *handle = new_handle(), 0; }
int cublasGetMathMode(void *handle, int *mode) { return *mode = 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { return *mode = 0; }
int cublasGemmEx(void *h, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int type, int lda,
                 const void *b, int tb_, int ldb, const void *beta, void *c) {
  return product(m, n, k, a, b, c, type, 1);
}
int cublasGemmStridedBatchedEx(void *h, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int type,
                               int lda, long long sa, const void *b, int tb_, int ldb, long long sb, const void *beta, void *c,
                               int tc, int ldc, long long sc, int batch) {
  return product(m, n, k, a, b, c, type, batch);
}
int cublasSgemm_v2(void *h, int ta, int tb, int m, int n, int k, const float *alpha, const float *a, int lda, const float *b,
                   int ldb, const float *beta, float *c) {
  return product(m, n, k, a, b, c, CUDA_R_32F_, 1);
}
int cublasSgemmStridedBatched(void *h, int ta, int tb, int m, int n, int k, const float *alpha, const float *a, int lda,
                              long long sa, const float *b, int ldb, long long sb, const float *beta, float *c, int ldc,
                              long long sc, int batch) {
  return product(m, n, k, a, b, c, CUDA_R_32F_, batch);
}
int cublasDgemm_v2(void *h, int ta, int tb, int m, int n, int k, const double *alpha, const double *a, int lda,
                   const double *b, int ldb, const double *beta, double *c) {
  return product(m, n, k, a, b, c, CUDA_R_64F_, 1);
}
int cublasDgemmStridedBatched(void *h, int ta, int tb, int m, int n, int k, const double *alpha, const double *a, int lda,
                              long long sa, const double *b, int ldb, long long sb, const double *beta, double *c, int ldc,
                              long long sc, int batch) {
  return product(m, n, k, a, b, c, CUDA_R_64F_, batch);
}

struct matrix { int type; long rows, columns; };
int cublasLtMatrixLayoutCreate(struct matrix **made, int type, uint64_t rows, uint64_t columns, int64_t ld) {
  *made = malloc(sizeof **made), **made = (struct matrix){type, rows, columns};
  return 0;
}
int cublasLtMatrixLayoutDestroy(struct matrix *layout) { return free(layout), 0; }
int cublasLtMatmulDescCreate(void **made, int compute, int scale) { return *made = new_handle(), 0; }
int cublasLtMatmulPreferenceCreate(void **made) { return *made = new_handle(), 0; }
struct heuristic { uint64_t algorithm[8]; size_t workspace; int state; float waves; int reserved[4]; };
int cublasLtMatmulAlgoGetHeuristic(void *h, void *d, void *a, void *b, void *c, void *e, void *p, int asked,
                                   struct heuristic *found, int *count) {
  return memset(found, 0, sizeof *found), *count = 1, 0;
}
int cublasLtMatmul(void *h, void *d, const void *alpha, const void *a, struct matrix *A, const void *b, struct matrix *B,
                   const void *beta, const void *c, struct matrix *C, void *e, struct matrix *E) {
  return product(E->rows, E->columns, A->rows * A->columns / E->rows, a, b, e, A->type, 1);
}

// ---- cudnn: descriptors that point at descriptors; an executed plan leads to its convolution -----------------------

enum { DATA_TYPE = 901, DIMENSIONS = 902, STRIDES = 903, DESCRIPTOR = 15, INT64 = 3 };  // cudnn_graph.h
enum { FORWARD_W = 703, DATA_W = 709, FILTER_DW = 715 };  // each followed by (D)X and (D)Y
struct descriptor { int type; int64_t dims[8], strides[8]; int count, role[16]; struct descriptor *child[16]; };

size_t cudnnGetVersion(void) { return CUDNN_VERSION; }
size_t cudnnGetCudartVersion(void) { return CUDART_VERSION; }
int cudnnGetProperty(int which, int *value) {
  return *value = which == 0 ? CUDNN_MAJOR : which == 1 ? CUDNN_MINOR : CUDNN_PATCHLEVEL, 0;
}
int cudnnCreate(void **handle) { return *handle = new_handle(), 0; }
const char *cudnnGetErrorString(int error) { return "an error of nullcuda"; }
int cudnnBackendCreateDescriptor(int kind, struct descriptor **made) { return *made = calloc(1, sizeof **made), 0; }

int cudnnBackendSetAttribute(struct descriptor *d, int name, int type, int64_t n, const void *values) {
  if (name == DATA_TYPE) d->type = *(int *)values;
  if (name == DIMENSIONS) memcpy(d->dims, values, 8 * n);
  if (name == STRIDES) memcpy(d->strides, values, 8 * n);
  for (int i = 0; type == DESCRIPTOR && i < n && d->count < 16; i++)
    d->role[d->count] = name, d->child[d->count++] = ((struct descriptor **)values)[i];
  return 0;
}

// What is asked for is filled in with zeros; descriptors (a heuristic's results) are made by the caller.
int cudnnBackendGetAttribute(struct descriptor *d, int name, int type, int64_t n, int64_t *count, void *values) {
  if (count) *count = type == DESCRIPTOR || type == INT64;
  if (type == INT64 && values) memset(values, 0, 8 * n);
  if (type == DESCRIPTOR && values && n > 0) {
    struct descriptor *result = *(struct descriptor **)values;
    if (result && result != d) result->count = 0, cudnnBackendSetAttribute(result, name, type, 1, &d);
  }
  return 0;
}

static void tensor_text(const struct descriptor *t, char *text) {
  int channels_last = t->dims[1] == 1 || t->strides[1] == 1;
  sprintf(text, "%ldx%ldx%ldx%ld %s %d", t->dims[0], t->dims[1], t->dims[2], t->dims[3], channels_last ? "NHWC" : "NCHW",
          t->type == 0 ? 4 : t->type == 1 ? 8 : 2);
}

static int find_convolution(const struct descriptor *d, int depth) {
  for (int i = 0; i < d->count; i++) {
    int role = d->role[i];
    if (role == FORWARD_W || role == DATA_W || role == FILTER_DW) {
      char w[100], x[100], y[100];
      tensor_text(d->child[i], w);
      for (int j = 0; j < d->count; j++) {
        if (d->role[j] == role + 1) tensor_text(d->child[j], x);
        if (d->role[j] == role + 2) tensor_text(d->child[j], y);
      }
      event("convolution", "%s w %s x %s y %s", role == FORWARD_W ? "forward" : role == DATA_W ? "data" : "filter", w, x, y);
      return 1;
    }
    if (depth < 8 && find_convolution(d->child[i], depth + 1)) return 1;
  }
  return 0;
}

int cudnnBackendExecute(void *handle, struct descriptor *plan, void *pointers) {
  if (!find_convolution(plan, 0)) event("convolution", "unknown");
  return node(), 0;
}
