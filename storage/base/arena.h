/* Arena: a bump allocator with a byte limit, freed whole.
 *
 * One request or one job owns one arena; everything it needs lives in it and goes with it. What
 * outlives the request is copied out. Not for sharing between threads. */
#ifndef ANND_STORAGE_BASE_ARENA_H
#define ANND_STORAGE_BASE_ARENA_H

#include <stddef.h>
#include <stdint.h>

struct arena_chunk;

struct arena {
    struct arena_chunk *chunks;
    size_t used_bytes; /* granted so far, padding included */
    size_t limit_bytes;
};

/* limit_bytes bounds the sum of all grants; nothing is allocated yet. */
void arena_init(struct arena *arena, size_t limit_bytes);
/* Frees everything; the arena may be used again. */
void arena_release(struct arena *arena);

/* 64-byte aligned, zeroed memory, or NULL when the limit or the machine's memory is reached. */
void *arena_alloc(struct arena *arena, size_t bytes);
/* A NUL-terminated copy; NULL as above. */
char *arena_strndup(struct arena *arena, const char *text, size_t bytes);

#endif
