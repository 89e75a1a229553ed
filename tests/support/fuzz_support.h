/* fuzz_support: what fuzz targets share: stopping on a wrong result, and making an input's length
 * and checksum right, since the writer of a file may be hostile and a fuzzer never guesses a CRC.
 *
 * No state; any thread. */
#ifndef ANND_TESTS_SUPPORT_FUZZ_SUPPORT_H
#define ANND_TESTS_SUPPORT_FUZZ_SUPPORT_H

#include <stddef.h>
#include <stdint.h>

#include "storage/base/error.h"

/* A target's only entry. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

/* Says what is wrong and aborts, which is how a fuzzer learns of it. */
void require(int ok, const char *what);
void require_why(int ok, const char *what, const struct error *err); /* and err's message */

/* A copy in memory of exactly this size, so that a read past the end is seen. The caller frees. */
uint8_t *fuzz_copy(const uint8_t *data, size_t bytes);

/* Headers of 64 bytes, as sections (quantiser.c, cells.c, walk_rule.c) and manifests have them: a
 * CRC-32C of all bytes at 12, itself as zero. Data shorter than that is left as it is. */
void fuzz_sign(uint8_t *data, size_t bytes);
void fuzz_sign_length(uint8_t *data, size_t bytes); /* the same, with the length at 16 as well */

#endif
