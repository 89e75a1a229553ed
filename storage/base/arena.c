/* Grants are cut from the newest chunk. When it is too small, a request that would fill a good
 * part of a chunk gets one of its own, kept behind the newest so that the newest's rest is not
 * lost; any other request starts a new chunk. Chunks never exceed what the limit still allows, so
 * a small arena costs little. Memory is zeroed when it is granted, not when it is taken. */
#include "storage/base/arena.h"

#include <stdlib.h>
#include <string.h>

#define GRANT_ALIGN 64u
#define CHUNK_BYTES ((size_t)64 * 1024)

struct arena_chunk {
    struct arena_chunk *next;
    size_t used_bytes; /* of the payload */
    size_t bytes;      /* of the payload, which starts GRANT_ALIGN after the chunk */
};

_Static_assert(sizeof(struct arena_chunk) <= GRANT_ALIGN, "the payload follows the header");

void arena_init(struct arena *arena, size_t limit_bytes)
{
    arena->chunks = NULL;
    arena->used_bytes = 0;
    arena->limit_bytes = limit_bytes;
}

void arena_release(struct arena *arena)
{
    struct arena_chunk *chunk = arena->chunks;

    while (chunk) {
        struct arena_chunk *next = chunk->next;

        free(chunk);
        chunk = next;
    }
    arena->chunks = NULL;
    arena->used_bytes = 0;
}

static struct arena_chunk *chunk_new(size_t bytes)
{
    struct arena_chunk *chunk;

    if (bytes > SIZE_MAX - GRANT_ALIGN)
        return NULL;
    chunk = aligned_alloc(GRANT_ALIGN, GRANT_ALIGN + bytes);
    if (!chunk)
        return NULL;
    chunk->next = NULL;
    chunk->used_bytes = 0;
    chunk->bytes = bytes;
    return chunk;
}

/* A chunk with room for `bytes`, a multiple of GRANT_ALIGN; NULL when memory is out. */
static struct arena_chunk *chunk_for(struct arena *arena, size_t bytes)
{
    struct arena_chunk *newest = arena->chunks;
    struct arena_chunk *chunk;
    size_t rest = (arena->limit_bytes - arena->used_bytes) & ~(size_t)(GRANT_ALIGN - 1);
    size_t chunk_bytes = rest < CHUNK_BYTES ? rest : CHUNK_BYTES;

    if (newest && newest->bytes - newest->used_bytes >= bytes)
        return newest;
    if (newest && bytes >= CHUNK_BYTES / 4) {
        chunk = chunk_new(bytes);
        if (!chunk)
            return NULL;
        chunk->next = newest->next;
        newest->next = chunk;
        return chunk;
    }
    chunk = chunk_new(bytes > chunk_bytes ? bytes : chunk_bytes);
    if (!chunk)
        return NULL;
    chunk->next = newest;
    arena->chunks = chunk;
    return chunk;
}

void *arena_alloc(struct arena *arena, size_t bytes)
{
    struct arena_chunk *chunk;
    uint8_t *grant;

    if (bytes > SIZE_MAX - GRANT_ALIGN)
        return NULL;
    /* Zero bytes still get an address of their own. */
    bytes = bytes == 0 ? GRANT_ALIGN : (bytes + GRANT_ALIGN - 1) & ~(size_t)(GRANT_ALIGN - 1);
    if (bytes > arena->limit_bytes - arena->used_bytes)
        return NULL;
    chunk = chunk_for(arena, bytes);
    if (!chunk)
        return NULL;
    grant = (uint8_t *)chunk + GRANT_ALIGN + chunk->used_bytes;
    chunk->used_bytes += bytes;
    arena->used_bytes += bytes;
    return memset(grant, 0, bytes);
}

char *arena_strndup(struct arena *arena, const char *text, size_t bytes)
{
    char *copy;

    if (bytes == SIZE_MAX)
        return NULL;
    copy = arena_alloc(arena, bytes + 1);
    if (copy && bytes > 0)
        memcpy(copy, text, bytes);
    return copy;
}
