/* Digests: SHA-256 for identity, a fixed 64-bit hash for keys.
 *
 * SHA-256 names segments and lets shipped files be compared; the key hash orders string keys in
 * the `keys` section and maps keys to slots, so it is part of the format: XXH3-64, seed 0. */
#ifndef ANND_STORAGE_BASE_DIGEST_H
#define ANND_STORAGE_BASE_DIGEST_H

#include <stddef.h>
#include <stdint.h>

#define DIGEST_BYTES 32u
#define KEY_SLOT_COUNT 4096u

struct digest; /* a running SHA-256; one thread at a time */

/* NULL only when memory is out. */
struct digest *digest_new(void);
void digest_update(struct digest *digest, const void *data, size_t bytes);
/* Writes the 32 bytes and frees the digest. */
void digest_finish(struct digest *digest, uint8_t out[DIGEST_BYTES]);

/* What a running digest of a multiple of 64 bytes has come to, so that it can go on in another
 * process. */
#define DIGEST_STATE_BYTES 40u
void digest_save(const struct digest *digest, uint8_t state[DIGEST_STATE_BYTES]);
void digest_restore(struct digest *digest, const uint8_t state[DIGEST_STATE_BYTES]);

/* Lower-case hex of `bytes` bytes and a NUL: out has 2 * bytes + 1. */
void digest_hex(const uint8_t *data, size_t bytes, char *out);

/* The format's 64-bit hash of a key's bytes. */
uint64_t key_hash(const void *key, size_t bytes);
/* The slot a key belongs to, 0..KEY_SLOT_COUNT-1: the hash's top 12 bits. int64 keys are hashed
 * as their 8 little-endian bytes. */
uint32_t key_slot(uint64_t hash);

#endif
