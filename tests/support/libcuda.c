/* A driver of CUDA without a GPU: devices whose memory is the host's, whose streams are done at once, and whose kernels
   are a function of whoever loads this. With it cuda.core and cuda.bindings run as they are; tests/device/test_cuda_libcuda.py.

   It is stricter than a driver has to be. What a driver may refuse in a thread without a context is refused, and what
   is of one device and is used on another: an event, a function, memory that is freed in the order of a default stream. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 101, NO_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500 };
enum { DEVICES = 4, LEGACY = 1, PER_THREAD = 2 };

/* A kernel, or a function, which is a kernel in a context: launches take both. */
typedef struct Kernel { char name[512]; int shared; void *context; struct Kernel *of, *functions[DEVICES]; } Kernel;
typedef struct { /* CUlaunchConfig */
    unsigned grid[3], block[3], shared;
    void *stream, *attributes;
    unsigned count;
} Launch;

static char contexts[DEVICES];
static int devices = 1;
static void *captured; /* the stream that is being captured into a graph */
static __thread void *current;
static size_t most = (size_t)1 << 34; /* bytes in one piece */
static char calls[1 << 16];
static int quiet; /* calls are not noted, which takes longer than they do */
/* What runs a kernel: name, grid and block, shared memory that it has and may have, stream, addresses of its parameters. */
static int (*run)(const char *, unsigned *, unsigned, int, void *, void **);

static void note(const char *call) {
    if (quiet) return;
    if (strlen(calls) + strlen(call) + 2 < sizeof calls) strcat(strcat(calls, call), " ");
}

EXPORT void stub_run(void *function) { run = function; }
EXPORT void stub_quiet(int on) { quiet = on; }
EXPORT void stub_most(size_t size) { most = size; }
EXPORT void stub_devices(int number) { devices = number; }
EXPORT void stub_captured(void *stream) { captured = stream; }
EXPORT const char *stub_calls(void) {
    static char taken[sizeof calls];
    strcpy(taken, calls);
    calls[0] = 0;
    return taken;
}

static int device_of(void *one) { return (char *)one - contexts; }
static int is_captured(void *stream) { return captured && stream == captured; } /* work is noted, and not done */
static int on_default(void *stream) { return (uintptr_t)stream <= PER_THREAD; }

static int owner; /* the process that began to use the driver, which its forked children cannot */
int cuInit(unsigned flags) {
    if (!owner) owner = getpid();
    return owner == getpid() ? OK : NOT_INITIALIZED;
}
int cuDriverGetVersion(int *version) { return *version = 13000, OK; }
int cuDeviceGetCount(int *count) { return *count = devices, OK; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal < devices ? OK : NO_DEVICE; }
int cuDeviceGetName(char *name, int size, int device) { return snprintf(name, size, "a stub"), OK; }
int cuDeviceGetUuid_v2(char *uuid, int device) { return memset(uuid, 7 + device, 16), OK; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 75: return *value = 9, OK;  /* compute capability */
    case 76: return *value = 0, OK;
    case 16: return *value = 132, OK;    /* multiprocessors */
    case 97: return *value = 232448, OK; /* shared memory of a block that asks */
    case 115: return *value = 1, OK;     /* memory pools */
    default: return *value = 1, OK;
    }
}
int cuDevicePrimaryCtxRetain(void **made, int device) { return *made = contexts + device, OK; }
int cuDevicePrimaryCtxRelease_v2(int device) { return OK; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { return *flags = 0, *active = 1, OK; }
int cuCtxSetCurrent(void *one) { return current = one, OK; }
int cuCtxGetCurrent(void **one) { return *one = current, owner == getpid() ? OK : NOT_INITIALIZED; }
int cuCtxGetDevice(int *device) { /* what fails is reported by compute-sanitizer, so it is an error here */
    if (!current) note("cuCtxGetDevice_without_context");
    return *device = current ? device_of(current) : 0, current ? OK : NO_CONTEXT;
}
int cuCtxPushCurrent_v2(void *one) { return current = one, OK; }
int cuCtxPopCurrent_v2(void **one) { return *one = current, current = 0, OK; }
int cuCtxGetStreamPriorityRange(int *least, int *greatest) { return *least = *greatest = 0, OK; }
int cuCtxSynchronize(void) { return note("wait_for_all"), current ? OK : NO_CONTEXT; }

int cuDeviceGetDefaultMemPool(void **pool, int device) { return *pool = contexts + device, OK; }
int cuDeviceGetMemPool(void **pool, int device) { return *pool = contexts + device, OK; }
int cuMemPoolGetAttribute(void *pool, int attribute, void *value) { return *(uint64_t *)value = 0, OK; }
int cuMemPoolSetAttribute(void *pool, int attribute, void *value) { return OK; }
int cuMemPoolSetAccess(void *pool, void *access, size_t count) { return OK; }
int cuMemPoolGetAccess(int *flags, void *pool, void *location) { return *flags = 3, OK; }

/* Memory begins 256 bytes after what was allocated for it, where its device is noted. */
static int allocate(uint64_t *address, size_t size, void *of) {
    if (size > most) return OUT_OF_MEMORY;
    char *start = aligned_alloc(256, 256 + (size + 255) / 256 * 256);
    if (!start) return OUT_OF_MEMORY;
    *(void **)start = of;
    return *address = (uint64_t)start + 256, OK;
}
static int release(uint64_t address, int by_context) {
    if (by_context && (!current || *(void **)(address - 256) != current)) {
        note("freed_on_another_device");
        return INVALID;
    }
    return free((void *)(address - 256)), OK;
}
int cuMemAllocFromPoolAsync(uint64_t *address, size_t size, void *pool, void *stream) {
    if (!current || on_default(stream) && pool != current) return NO_CONTEXT;
    return allocate(address, size, pool);
}
int cuMemAllocAsync(uint64_t *address, size_t size, void *stream) {
    return current ? allocate(address, size, current) : NO_CONTEXT;
}
int cuMemAlloc_v2(uint64_t *address, size_t size) { return current ? allocate(address, size, current) : NO_CONTEXT; }
int cuMemFreeAsync(uint64_t address, void *stream) { return note("free"), release(address, on_default(stream)); }
int cuMemFree_v2(uint64_t address) { return note("free_at_once"), release(address, 0); }
int cuMemHostAlloc(void **address, size_t size, unsigned flags) {
    return current ? allocate((uint64_t *)address, size, current) : NO_CONTEXT;
}
int cuMemFreeHost(void *address) { return release((uint64_t)address, 0); }
int cuMemsetD8Async(uint64_t address, unsigned char x, size_t size, void *stream) {
    if (!current) return NO_CONTEXT;
    if (is_captured(stream)) return note("captured"), OK;
    return memset((void *)address, x, size), OK;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t size, void *stream) {
    if (!current) return NO_CONTEXT;
    if (is_captured(stream)) return note("captured_write"), OK;
    return memcpy((void *)to, from, size), note("write"), OK;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *stream) {
    if (!current) return NO_CONTEXT;
    return memcpy(to, (void *)from, size), note("read"), OK;
}
int cuPointerGetAttribute(void *value, int attribute, uint64_t address) { return *(int *)value = 0, OK; }

int cuStreamGetCtx(void *stream, void **one) { return *one = current, current ? OK : NO_CONTEXT; }
int cuStreamGetCtx_v2(void *stream, void **one, void **green) {
    return *one = current, *green = 0, current ? OK : NO_CONTEXT;
}
int cuStreamGetDevice(void *stream, int *device) { return cuCtxGetDevice(device); }
int cuStreamIsCapturing(void *stream, int *status) {
    return *status = is_captured(stream), current ? OK : NO_CONTEXT;
}
int cuStreamGetCaptureInfo_v2(void *stream, int *status, ...) { return *status = is_captured(stream), OK; }
int cuStreamSynchronize(void *stream) { return note("synchronize"), current ? OK : NO_CONTEXT; }
int cuStreamWaitEvent(void *stream, void *event, unsigned flags) { return note("wait"), current ? OK : NO_CONTEXT; }
int cuEventCreate(void **event, unsigned flags) { return *event = current, current ? OK : NO_CONTEXT; }
int cuEventRecord(void *event, void *stream) {
    return note("record"), !current ? NO_CONTEXT : on_default(stream) && event != current ? INVALID_HANDLE : OK;
}
int cuEventSynchronize(void *event) { return OK; }
int cuEventDestroy_v2(void *event) { return OK; }

static const char *code; /* the machine code loaded last */
int cuLibraryLoadData(void **library, const void *data, void *a, void *b, unsigned n, void *c, void *d, unsigned m) {
    return code = data, *library = (void *)code, memcmp(code, "\177ELF", 4) ? 200 : OK;
}
int cuLibraryUnload(void *library) { return OK; }
int cuLibraryGetKernel(Kernel **kernel, void *library, const char *name) {
    *kernel = calloc(1, sizeof(Kernel));
    strncpy((*kernel)->name, name, sizeof (*kernel)->name - 1);
    (*kernel)->shared = 48 * 1024;
    return OK;
}
int cuKernelGetFunction(Kernel **function, Kernel *kernel) {
    if (!current) return NO_CONTEXT;
    Kernel **own = kernel->functions + device_of(current);
    if (!*own) {
        *own = calloc(1, sizeof(Kernel));
        **own = *kernel;
        (*own)->context = current, (*own)->of = kernel;
    }
    return *function = *own, OK;
}
int cuKernelGetLibrary(void **library, Kernel *kernel) { return *library = (void *)code, OK; }
int cuKernelSetAttribute(int attribute, int value, Kernel *kernel, int device) {
    if (attribute == 9) return value == 100 ? OK : INVALID; /* carveout */
    if (attribute != 8 || value > 232448) return INVALID;
    return kernel->shared = value, OK;
}
int cuKernelGetAttribute(int *value, int attribute, Kernel *kernel, int device) { return *value = 0, OK; }
static int start(Kernel *kernel, unsigned *grid, unsigned threads, unsigned shared, void *stream, void **parameters) {
    if (!current) return NO_CONTEXT;
    if (kernel->context && kernel->context != current) return INVALID_HANDLE;
    if (kernel->of) kernel = kernel->of;
    if ((int)shared > kernel->shared) return INVALID;
    if (is_captured(stream)) return note("captured"), OK;
    return run ? run(kernel->name, grid, threads, shared, stream, parameters) : OK;
}
int cuLaunchKernelEx(Launch *launch, Kernel *kernel, void **parameters, void **extra) {
    note("launch");
    return start(kernel, launch->grid, launch->block[0], launch->shared, launch->stream, parameters);
}
int cuLaunchKernel(Kernel *kernel, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned b, unsigned c,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    unsigned grid[3] = {x, y, z};
    void *each[512];
    note("launch_again");
    if (extra) { /* a buffer of parameters, all of 8 bytes */
        if (parameters || extra[0] != (void *)1 || extra[2] != (void *)2 || extra[4]) return INVALID;
        size_t count = *(size_t *)extra[3] / 8;
        if (count > 512) return INVALID;
        for (size_t n = 0; n < count; n++) each[n] = (char *)extra[1] + 8 * n;
        parameters = each;
    }
    return start(kernel, grid, threads, shared, stream, parameters);
}

int cuGetErrorName(int error, const char **name) {
    *name = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : error == INVALID ? "CUDA_ERROR_INVALID_VALUE"
            : error == NO_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT" : "CUDA_ERROR";
    return OK;
}
int cuGetErrorString(int error, const char **text) { return *text = "said by a stub", OK; }

static int missing(void) { return NOT_FOUND; }
#define ENTRY(name) {#name, name}
#define AS(name, version) {#name, name##version}
static struct { const char *name; void *function; } entries[] = {
    ENTRY(cuInit), ENTRY(cuDriverGetVersion), ENTRY(cuDeviceGetCount), ENTRY(cuDeviceGet), ENTRY(cuDeviceGetName),
    AS(cuDeviceGetUuid, _v2), ENTRY(cuDeviceGetAttribute), ENTRY(cuDevicePrimaryCtxRetain),
    AS(cuDevicePrimaryCtxRelease, _v2), ENTRY(cuDevicePrimaryCtxGetState), ENTRY(cuCtxSetCurrent), ENTRY(cuCtxGetCurrent),
    ENTRY(cuCtxGetDevice), AS(cuCtxPushCurrent, _v2), AS(cuCtxPopCurrent, _v2), ENTRY(cuCtxGetStreamPriorityRange),
    ENTRY(cuCtxSynchronize), ENTRY(cuDeviceGetDefaultMemPool), ENTRY(cuDeviceGetMemPool), ENTRY(cuMemPoolGetAttribute),
    ENTRY(cuMemPoolSetAttribute), ENTRY(cuMemPoolSetAccess), ENTRY(cuMemPoolGetAccess), ENTRY(cuMemAllocFromPoolAsync),
    ENTRY(cuMemAllocAsync), AS(cuMemAlloc, _v2), ENTRY(cuMemFreeAsync), AS(cuMemFree, _v2), ENTRY(cuMemHostAlloc),
    ENTRY(cuMemFreeHost), ENTRY(cuMemsetD8Async), AS(cuMemcpyHtoDAsync, _v2), AS(cuMemcpyDtoHAsync, _v2), ENTRY(cuPointerGetAttribute),
    ENTRY(cuStreamGetCtx), ENTRY(cuStreamIsCapturing), AS(cuStreamGetCaptureInfo, _v2), ENTRY(cuStreamGetDevice), ENTRY(cuStreamSynchronize), ENTRY(cuStreamWaitEvent),
    ENTRY(cuEventCreate), ENTRY(cuEventRecord), ENTRY(cuEventSynchronize), AS(cuEventDestroy, _v2),
    ENTRY(cuLibraryLoadData), ENTRY(cuLibraryUnload), ENTRY(cuLibraryGetKernel), ENTRY(cuKernelGetFunction),
    ENTRY(cuKernelGetLibrary), ENTRY(cuKernelSetAttribute), ENTRY(cuKernelGetAttribute), ENTRY(cuLaunchKernelEx), ENTRY(cuLaunchKernel),
    ENTRY(cuGetErrorName), ENTRY(cuGetErrorString),
};

EXPORT int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
    *function = (void *)missing;
    for (size_t n = 0; n < sizeof entries / sizeof *entries; n++)
        if (!strcmp(name, entries[n].name)) *function = entries[n].function;
    if (!strcmp(name, "cuGetProcAddress")) *function = (void *)cuGetProcAddress_v2;
    if (status) *status = *function == (void *)missing; /* CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND */
    if (*function == (void *)missing && getenv("STUB_SHOWS")) fprintf(stderr, "not in the stub: %s\n", name);
    return OK;
}
