/* How it works: see the header; nothing here depends on what a target decodes. */
#include "tests/support/fuzz_support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "storage/base/bytes.h"

#define CRC_AT 12u
#define BYTES_AT 16u
#define HEADER_BYTES 64u

void require(int ok, const char *what)
{
    if (!ok) {
        fprintf(stderr, "%s\n", what);
        abort();
    }
}

void require_why(int ok, const char *what, const struct error *err)
{
    if (!ok) {
        fprintf(stderr, "%s: %s\n", what, err->message);
        abort();
    }
}

uint8_t *fuzz_copy(const uint8_t *data, size_t bytes)
{
    uint8_t *copy = malloc(bytes);

    require(copy != NULL || bytes == 0, "no memory");
    if (bytes)
        memcpy(copy, data, bytes);
    return copy;
}

void fuzz_sign(uint8_t *data, size_t bytes)
{
    if (bytes < HEADER_BYTES)
        return;
    store_u32(data + CRC_AT, 0);
    store_u32(data + CRC_AT, crc32c(0, data, bytes));
}

void fuzz_sign_length(uint8_t *data, size_t bytes)
{
    if (bytes < HEADER_BYTES)
        return;
    store_u64(data + BYTES_AT, bytes);
    fuzz_sign(data, bytes);
}
