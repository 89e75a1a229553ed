/* Bytes: little-endian loads and stores, checked size arithmetic, CRC-32C.
 *
 * Everything annd writes is little-endian and fixed-width; these functions are the only way bytes
 * become numbers, so a big-endian port is this file. No I/O, no globals; any thread. */
#ifndef ANND_STORAGE_BASE_BYTES_H
#define ANND_STORAGE_BASE_BYTES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline uint16_t load_u16(const void *p)
{
    uint16_t v;

    memcpy(&v, p, sizeof v);
    return v;
}

static inline uint32_t load_u32(const void *p)
{
    uint32_t v;

    memcpy(&v, p, sizeof v);
    return v;
}

static inline uint64_t load_u64(const void *p)
{
    uint64_t v;

    memcpy(&v, p, sizeof v);
    return v;
}

static inline float load_f32(const void *p)
{
    float v;

    memcpy(&v, p, sizeof v);
    return v;
}

static inline double load_f64(const void *p)
{
    double v;

    memcpy(&v, p, sizeof v);
    return v;
}

static inline void store_u16(void *p, uint16_t v)
{
    memcpy(p, &v, sizeof v);
}

static inline void store_u32(void *p, uint32_t v)
{
    memcpy(p, &v, sizeof v);
}

static inline void store_u64(void *p, uint64_t v)
{
    memcpy(p, &v, sizeof v);
}

static inline void store_f32(void *p, float v)
{
    memcpy(p, &v, sizeof v);
}

static inline void store_f64(void *p, double v)
{
    memcpy(p, &v, sizeof v);
}

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the loads and stores above assume a little-endian machine; swap here"
#endif

/* Checked arithmetic on sizes that come from files or requests: false on overflow, and then *out
 * is not to be used. */
static inline bool size_mul(uint64_t a, uint64_t b, uint64_t *out)
{
    return !__builtin_mul_overflow(a, b, out);
}

static inline bool size_add(uint64_t a, uint64_t b, uint64_t *out)
{
    return !__builtin_add_overflow(a, b, out);
}

/* Smallest multiple of `unit` (a power of two) that is >= value. */
static inline uint64_t align_up(uint64_t value, uint64_t unit)
{
    return (value + unit - 1) & ~(unit - 1);
}

/* CRC-32C (Castagnoli), as in iSCSI and ext4: crc32c(0, "123456789", 9) == 0xE3069283.
 * Feeding pieces in order gives the CRC of the whole: pass the previous result as `crc`.
 * Uses the SSE4.2 instruction where the CPU has it; crc32c_portable is the reference. */
uint32_t crc32c(uint32_t crc, const void *data, size_t bytes);
uint32_t crc32c_portable(uint32_t crc, const void *data, size_t bytes);

/* CRC of A followed by B from their CRCs and B's length, so that parts checksummed on several
 * threads combine into the checksum of the file. */
uint32_t crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t bytes_b);

#endif
