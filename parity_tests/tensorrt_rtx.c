/* NVIDIA's TensorRT Python bindings load three libraries by name: libnvinfer.so.11, libnvinfer_plugin.so.11 and
 * libnvonnxparser.so.11. This file, compiled once under each of these names, hands their entry points on to
 * TensorRT-RTX, whose parser and ahead-of-time builder need no GPU. Each entry point checks the version that its caller
 * was compiled for, so RTX is told its own. See tensorrt_rtx.py.
 *
 *   cc -shared -fPIC -DCORE="\".../libtensorrt_rtx.so.1.7.1\"" -DPARSER="\"...\"" -DVERSION=10701 -o libnvinfer.so.11
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

static void *entry(const char *library, const char *name) {
    void *handle = dlopen(library, RTLD_NOW | RTLD_GLOBAL);
    void *found = handle ? dlsym(handle, name) : NULL;
    if (!found) {
        fprintf(stderr, "%s\n", dlerror());
        exit(3);
    }
    return found;
}

/* The parser finds the core's symbols only once the core is loaded. */
static void *parser(const char *name) {
    entry(CORE, "getPluginRegistry");
    return entry(PARSER, name);
}

void *createInferBuilder_INTERNAL(void *logger, int version) {
    (void)version;
    return ((void *(*)(void *, int))entry(CORE, "createInferBuilder_INTERNAL"))(logger, VERSION);
}

void *createInferRuntime_INTERNAL(void *logger, int version) {
    (void)version;
    return ((void *(*)(void *, int))entry(CORE, "createInferRuntime_INTERNAL"))(logger, VERSION);
}

void *createInferRefitter_INTERNAL(void *engine, void *logger, int version) {
    (void)version;
    return ((void *(*)(void *, void *, int))entry(CORE, "createInferRefitter_INTERNAL"))(engine, logger, VERSION);
}

void *getPluginRegistry(void) { return ((void *(*)(void))entry(CORE, "getPluginRegistry"))(); }

void *getBuilderPluginRegistry(int capability) {
    return ((void *(*)(int))entry(CORE, "getBuilderPluginRegistry"))(capability);
}

int getInferLibVersion(void) { return VERSION; }

int initLibNvInferPlugins(void *logger, const char *namespace) {
    (void)logger;
    (void)namespace;
    return 1; /* RTX has no plugin library, and the portable graph needs none */
}

void *createNvOnnxParser_INTERNAL(void *network, void *logger, int version) {
    (void)version;
    return ((void *(*)(void *, void *, int))parser("createNvOnnxParser_INTERNAL"))(network, logger, VERSION);
}

void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int version) {
    (void)version;
    return ((void *(*)(void *, void *, int))parser("createNvOnnxParserRefitter_INTERNAL"))(refitter, logger, VERSION);
}

int getNvOnnxParserVersion(void) { return VERSION; }
