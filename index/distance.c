/* How it works: at the first question the CPU is asked once (cpuid for the instructions, xgetbv for
 * whether the operating system saves the wide registers), the tables that may run are noted, and
 * every later question is an array look-up. cpuid is read here and not through
 * __builtin_cpu_supports because clang 14 does not know "f16c". The VNNI table is the AVX-512 one
 * with its integer kernels replaced, so it is put together here rather than by the linker. */
#include "index/distance.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <strings.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

static pthread_once_t detect_once = PTHREAD_ONCE_INIT;
static const struct distance_kernels *tables[ISA_COUNT];
static const struct distance_kernels *best;

#if defined(__x86_64__)
static struct distance_kernels vnni_over_avx512;

#define BIT(word, n) (((word) >> (n)) & 1u)
#define XCR0_YMM 0x06u /* SSE and AVX state */
#define XCR0_ZMM 0xe6u /* and mask registers and both halves of the ZMM state */

static uint32_t xcr0_low(void)
{
    uint32_t eax, edx;

    __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return eax;
}

static void lay_vnni_over_avx512(void)
{
    const struct distance_kernels *vnni = &distance_avx512vnni_kernels;
    struct distance_kernels *out = &vnni_over_avx512;

    *out = distance_avx512_kernels;
    out->name = vnni->name;
    out->l2_u8 = vnni->l2_u8;
    out->ip_u8 = vnni->ip_u8;
    out->cosine_u8 = vnni->cosine_u8;
    out->norm2_u8 = vnni->norm2_u8;
    out->l2_i8 = vnni->l2_i8;
    out->ip_i8 = vnni->ip_i8;
    out->cosine_i8 = vnni->cosine_i8;
    out->norm2_i8 = vnni->norm2_i8;
}

static void detect_wide_tables(void)
{
    uint32_t eax, ebx, ecx, edx, xcr0;
    bool fma, f16c;

    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !BIT(ecx, 27) || !BIT(ecx, 28))
        return; /* no OSXSAVE or no AVX */
    fma = BIT(ecx, 12);
    f16c = BIT(ecx, 29);
    xcr0 = xcr0_low();
    if ((xcr0 & XCR0_YMM) != XCR0_YMM || !fma || !f16c)
        return;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !BIT(ebx, 5))
        return; /* no AVX2 */
    tables[ISA_AVX2] = &distance_avx2_kernels;
    if ((xcr0 & XCR0_ZMM) != XCR0_ZMM)
        return;
    if (!BIT(ebx, 16) || !BIT(ebx, 17) || !BIT(ebx, 30) || !BIT(ebx, 31))
        return; /* F, DQ, BW, VL */
    tables[ISA_AVX512] = &distance_avx512_kernels;
    if (!BIT(ecx, 11))
        return;
    lay_vnni_over_avx512();
    tables[ISA_AVX512_VNNI] = &vnni_over_avx512;
}
#else
static void detect_wide_tables(void)
{
}
#endif

static void detect(void)
{
    const char *wanted = getenv("ANND_ISA");

    tables[ISA_SCALAR] = &distance_scalar_kernels;
    detect_wide_tables();
    for (int isa = 0; isa < ISA_COUNT; isa++) {
        if (tables[isa])
            best = tables[isa];
    }
    for (int isa = 0; wanted && isa < ISA_COUNT; isa++) {
        if (tables[isa] && strcasecmp(wanted, tables[isa]->name) == 0)
            best = tables[isa];
    }
}

const struct distance_kernels *distance_kernels_for(enum isa isa)
{
    pthread_once(&detect_once, detect);
    if ((unsigned)isa >= ISA_COUNT)
        return NULL;
    return tables[isa];
}

const struct distance_kernels *distance_kernels_best(void)
{
    pthread_once(&detect_once, detect);
    return best;
}
