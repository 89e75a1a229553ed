/* GEMM: the one door to OpenBLAS. Matrices are row-major float32 unless said otherwise.
 *
 * OpenBLAS runs with one thread: parallelism is the pool's, and a result depends on the shapes of
 * the calls alone, so fixed blocks give the same bytes with 1 and with N workers (on one CPU type;
 * never compare bytes between CPUs). At most GEMM_CALLERS_MAX calls are inside the library at once
 * and further callers wait: OpenBLAS ends the process when hundreds of threads enter it. For
 * training and building only; the search path has its own kernels. */
#ifndef ANND_INDEX_GEMM_H
#define ANND_INDEX_GEMM_H

#include <stdbool.h>
#include <stdint.h>

#include "storage/base/error.h"

#define GEMM_CALLERS_MAX 8

/* The very first call of main, before threads or descriptors: when OpenBLAS took AVX2 kernels on a
 * CPU that has AVX-512 (Debian's 0.3.21 does not know the newer ones), sets OPENBLAS_CORETYPE and
 * executes this program again, once, with the same argv. The library reads the variable while it is
 * loaded, so there is no other way. Returns when there is nothing to do: the choice is right, the
 * user set OPENBLAS_CORETYPE, or /proc is missing. */
void gemm_pick_core(char **argv);

/* Sets one thread and makes a first call, so that OpenBLAS maps its buffers before any sandbox is
 * closed. Any thread, any number of times; the functions below do it when nobody did. */
void gemm_init(void);

/* The kernels OpenBLAS chose ("SkylakeX", "Haswell"), for logs. */
const char *gemm_core_name(void);
/* Those it had chosen before gemm_pick_core started the program again; NULL when that was not
 * needed. */
const char *gemm_core_before(void);

/* c = alpha * op(a) op(b) + beta * c with op(a) m x k, op(b) k x n, c m x n; op transposes where
 * the flag says so. Strides are floats between rows as stored. Sizes up to INT32_MAX. Any thread.
 */
void gemm_f32(bool transpose_a, bool transpose_b, uint64_t m, uint64_t n, uint64_t k, float alpha,
              const float *a, uint64_t a_stride, const float *b, uint64_t b_stride, float beta,
              float *c, uint64_t c_stride);

/* Eigen decomposition of a symmetric matrix of doubles, size x size. On return row i of `matrix` is
 * the unit eigenvector of values[i]; values ascend. Takes 2 * size^2 doubles more while it runs.
 * ERR_INVALID: size is 0 or above 16,384; ERR_NOMEM; ERR_INTERNAL when it does not converge. */
int gemm_eigen_symmetric(double *matrix, uint32_t size, double *values, struct error *err);

#endif
