/* OpenBLAS picks its kernels and starts its threads from a constructor, before main: what it should
 * know must be in the environment by then. gemm_pick_core therefore looks at what was picked and,
 * when it is wrong, starts the program over with the variable set; that the variable is set is also
 * what stops a second round.
 *
 * OpenBLAS takes a buffer from a fixed table for each running call, and ends the process when the
 * table is full. A semaphore at this door keeps the number of running calls far below. */
#include "index/gemm.h"

#include <assert.h>
#include <cblas.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <semaphore.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <unistd.h>

/* Debian's OpenBLAS exports LAPACK's Fortran symbols but ships no lapacke.h. The two sizes at the
 * end are the lengths of the character arguments, which Fortran passes out of sight. */
void dsyevd_(const char *job, const char *part, const int *size, double *matrix, const int *stride,
             double *values, double *work, const int *work_size, int *iwork, const int *iwork_size,
             int *info, size_t job_length, size_t part_length);

static const uint32_t eigen_size_max = 16384;
/* Tells the second start what the first one found. */
static const char before_variable[] = "ANND_OPENBLAS_BEFORE";

static pthread_once_t init_once = PTHREAD_ONCE_INIT;
static sem_t callers;

static bool cpu_has_avx512(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
    return false;
#endif
}

/* Names of OpenBLAS' kernel sets that stop at AVX2. */
static bool core_is_avx2(const char *name)
{
    static const char *const names[] = {"Haswell", "Zen", "Excavator"};

    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (strcasecmp(name, names[i]) == 0)
            return true;
    }
    return false;
}

void gemm_pick_core(char **argv)
{
    if (getenv("OPENBLAS_CORETYPE") || !cpu_has_avx512() || !core_is_avx2(gemm_core_name()))
        return;
    /* Started as "ld.so program ...", /proc/self/exe is the loader and argv is not its argv; only
     * then (or when linked statically) the loader has no base address of its own. */
    if (getauxval(AT_BASE) == 0)
        return;
    if (setenv("OPENBLAS_CORETYPE", "SKYLAKEX", 1) < 0)
        return;
    setenv("OPENBLAS_NUM_THREADS", "1", 1);
    setenv(before_variable, gemm_core_name(), 1);
    execv("/proc/self/exe", argv);
    /* Slower kernels are no reason to fail; children should not inherit a choice we do not run. */
    unsetenv("OPENBLAS_CORETYPE");
    unsetenv(before_variable);
}

static void call_begin(void)
{
    while (sem_wait(&callers) < 0)
        assert(errno == EINTR);
}

static void call_end(void)
{
    sem_post(&callers);
}

static void init_library(void)
{
    float a[64], b[64], c[64];

    sem_init(&callers, 0, GEMM_CALLERS_MAX);
    openblas_set_num_threads(1);
    memset(a, 0, sizeof a);
    memset(b, 0, sizeof b);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, 8, 8, 8, 1.0f, a, 8, b, 8, 0.0f, c, 8);
}

void gemm_init(void)
{
    pthread_once(&init_once, init_library);
}

const char *gemm_core_name(void)
{
    return openblas_get_corename();
}

const char *gemm_core_before(void)
{
    return getenv("OPENBLAS_CORETYPE") ? getenv(before_variable) : NULL;
}

void gemm_f32(bool transpose_a, bool transpose_b, uint64_t m, uint64_t n, uint64_t k, float alpha,
              const float *a, uint64_t a_stride, const float *b, uint64_t b_stride, float beta,
              float *c, uint64_t c_stride)
{
    assert(m <= INT_MAX && n <= INT_MAX && k <= INT_MAX);
    assert(a_stride <= INT_MAX && b_stride <= INT_MAX && c_stride <= INT_MAX);
    if (m == 0 || n == 0)
        return;
    gemm_init();
    call_begin();
    cblas_sgemm(CblasRowMajor, transpose_a ? CblasTrans : CblasNoTrans,
                transpose_b ? CblasTrans : CblasNoTrans, (int)m, (int)n, (int)k, alpha, a,
                (int)a_stride, b, (int)b_stride, beta, c, (int)c_stride);
    call_end();
}

int gemm_eigen_symmetric(double *matrix, uint32_t size, double *values, struct error *err)
{
    double *work = NULL;
    int *iwork = NULL;
    int n = (int)size;
    int work_size, iwork_size;
    int info = 0;
    int rc = -1;

    if (size == 0 || size > eigen_size_max)
        return error_set(err, ERR_INVALID,
                         "eigen decomposition takes matrices of 1 to %u rows, not %u",
                         eigen_size_max, size);
    gemm_init();
    /* The sizes LAPACK's manual asks for when vectors are wanted; 1 + 6n + 2n^2 fits an int. */
    work_size = 1 + 6 * n + 2 * n * n;
    iwork_size = 3 + 5 * n;
    work = malloc((size_t)work_size * sizeof *work);
    iwork = malloc((size_t)iwork_size * sizeof *iwork);
    if (!work || !iwork) {
        error_set(err, ERR_NOMEM, "no memory for the eigen decomposition of %u x %u", size, size);
        goto done;
    }
    /* Column-major and symmetric: LAPACK's lower triangle is our upper one, and its eigenvector
     * columns are our rows. */
    call_begin();
    dsyevd_("V", "L", &n, matrix, &n, values, work, &work_size, iwork, &iwork_size, &info, 1, 1);
    call_end();
    if (info != 0) {
        error_set(err, ERR_INTERNAL, "eigen decomposition of %u x %u failed: dsyevd info %d", size,
                  size, info);
        goto done;
    }
    rc = 0;
done:
    free(work);
    free(iwork);
    return rc;
}
