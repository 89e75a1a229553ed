/* SHA-256 comes from nettle and XXH3 from libxxhash; no other file includes either. */
#include "storage/base/digest.h"

#include <assert.h>
#include <nettle/sha2.h>
#include <stdlib.h>
#include <xxhash.h>

#include "storage/base/bytes.h"

_Static_assert(DIGEST_BYTES == SHA256_DIGEST_SIZE, "a digest is a SHA-256");
_Static_assert(KEY_SLOT_COUNT == 1u << 12, "key_slot takes the top 12 bits");

struct digest {
    struct sha256_ctx context;
};

struct digest *digest_new(void)
{
    struct digest *digest = malloc(sizeof *digest);

    if (digest)
        sha256_init(&digest->context);
    return digest;
}

void digest_update(struct digest *digest, const void *data, size_t bytes)
{
    if (bytes > 0)
        sha256_update(&digest->context, bytes, data);
}

void digest_finish(struct digest *digest, uint8_t out[DIGEST_BYTES])
{
    sha256_digest(&digest->context, DIGEST_BYTES, out);
    free(digest);
}

/* nettle has no call for this, but its context is public and SHA-256's own: the eight words, the
 * number of whole 64-byte blocks and the part of the next one, which is empty here. */
void digest_save(const struct digest *digest, uint8_t state[DIGEST_STATE_BYTES])
{
    assert(digest->context.index == 0);
    for (uint32_t i = 0; i < 8; i++)
        store_u32(state + 4 * i, digest->context.state[i]);
    store_u64(state + 32, digest->context.count);
}

void digest_restore(struct digest *digest, const uint8_t state[DIGEST_STATE_BYTES])
{
    sha256_init(&digest->context);
    for (uint32_t i = 0; i < 8; i++)
        digest->context.state[i] = load_u32(state + 4 * i);
    digest->context.count = load_u64(state + 32);
}

void digest_hex(const uint8_t *data, size_t bytes, char *out)
{
    static const char digits[] = "0123456789abcdef";

    for (size_t i = 0; i < bytes; i++) {
        out[2 * i] = digits[data[i] >> 4];
        out[2 * i + 1] = digits[data[i] & 15u];
    }
    out[2 * bytes] = '\0';
}

uint64_t key_hash(const void *key, size_t bytes)
{
    return XXH3_64bits(key, bytes);
}

uint32_t key_slot(uint64_t hash)
{
    return (uint32_t)(hash >> 52);
}
