/* Canonical minimum edit scripts between int32 token sequences (edit_distance.py says what they are for).

   The table.  D[i][j] is the distance between the suffixes noisy[i:] and clean[j:], so the answer is D[0][0]:

       D[i][j] = D[i+1][j+1]                                           if noisy[i] == clean[j]                 (KEEP)
       D[i][j] = 1 + min(D[i+1][j+1], D[i+1][j], D[i][j+1])            otherwise                     (SUB, DEL, INS)

   The canonical script starts at (0, 0) and takes, wherever it stands, the first of KEEP, SUB, DEL, INS that lies on an
   optimal path. Hence distances of *suffixes*: the table is filled from its far corner, on the reversed sequences, and
   traced from the near one. Equal tokens in front are kept whatever follows, so a common prefix never enters the table.

   Nor does a common suffix, because the distances of what stands before it are the same without it. Where the trace
   has used up all of one sequence but the suffix, as many insertions (or deletions) are left as the rests differ in
   length; no table is needed to keep what is equal on the way: `a` -> `a a` keeps the first a.

   The bits (Myers 1999, in the form of Hyyro 2003).  Row r of the table stands for the token noisy[n-1-r], column c for
   clean[m-1-c]. Neighbouring cells differ by -1, 0 or +1, and a diagonal step costs 0 or 1. So D need not be stored:
   a column is a few bit vectors, one bit per row, and some fifteen operations on 64-bit words turn 64 rows of one
   column into the same rows of the next:

       eq       the tokens of this row and of this column are equal
       d0       the diagonal step into this cell costs nothing
       vp, vn   this row is one more, one less than the row before          (vertical differences)
       hp, hn   this column is one more, one less than the column before    (horizontal differences)

   d0 follows from eq and from vp and vn of the column before: a step is free if eq or vn is set, or if the step into the
   row before is free and vp is set there. Such runs are what the carries of an addition do: hence the plus sign. Then hp
   and hn follow from d0, vp and vn; the new vp and vn from d0, hp and hn of the row before, one shift away. Of hp the
   complement is stored, which shortens the chain of operations from column to column: a tenth of the time.

   More than 64 rows.  The table is filled block by block, 128 rows from the first to the last column, then the next 128
   rows. A block is two words, since a processor can work on the second while it waits for the first one's next column.
   What a word must know of the word before it are hp and hn of its last row, two bits per column.

   The trace needs two bits per cell, and only these are kept: d0, and vp. Where the tokens differ, d0 = 0 says that
   substituting is optimal; else vp = 1 says that deleting is; else only inserting is left.  */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { KEEP, SUB, DEL, INS };

typedef struct { /* 64 rows of a column */
    uint64_t d0, vp;
} word;

typedef struct { /* a token of `noisy` */
    uint64_t key;  /* 1 << 32 | token; 0 where the slot is free */
    uint64_t rows[2]; /* eq, for any column with this token: its rows in the block at work; free: 0 */
} slot;

typedef struct { /* one pair at work, without its common ends; the memory is kept from pair to pair */
    const int32_t *noisy, *clean;
    int64_t n, m;
    void *memory;
    size_t capacity;
    word *words;                        /* [blocks][m][2] */
    slot *slots;                        /* [1 << slot_bits]: a hash table */
    slot **row_slot, **column_slot;     /* [n], [m]: where the token of a row, of a column, is */
    uint8_t *not_hp_before, *hn_before; /* [m]: of the last row of the block before */
    int slot_bits;
} pair;

static uint64_t key_of(int32_t token) { return (uint64_t)1 << 32 | (uint32_t)token; }

/* The slot of a token, or the free one that it may have. Most slots are free, so the first is mostly right.
   `&` instead of `&&`: whether a token occurs in both sequences is a coin toss, and no branch should hang on it. */
static slot *find_slot(const pair *p, uint64_t key)
{
    uint64_t last = ((uint64_t)1 << p->slot_bits) - 1;
    uint64_t at = key * 0x9E3779B97F4A7C15u >> (64 - p->slot_bits); /* Knuth's multiplicative hashing */
    while ((p->slots[at].key != key) & (p->slots[at].key != 0)) at = (at + 1) & last;
    return &p->slots[at];
}

/* Divides the memory into the arrays, and looks every token up. Returns -1 when out of memory. */
static int set_up(pair *p)
{
    int64_t n = p->n, m = p->m, words = (n + 127) / 128 * m * 2, slots = 2;
    for (p->slot_bits = 1; slots < 4 * (n + m); p->slot_bits++) slots *= 2;
    size_t needed = words * sizeof(word) + slots * sizeof(slot) + (n + m) * sizeof(slot *) + 2 * m;
    if (needed > p->capacity) {
        free(p->memory);
        p->memory = malloc(needed);
        p->capacity = p->memory ? needed : 0;
        if (!p->memory) return -1;
    }
    p->words = p->memory;
    p->slots = (slot *)(p->words + words);
    p->row_slot = (slot **)(p->slots + slots);
    p->column_slot = p->row_slot + n;
    p->not_hp_before = (uint8_t *)(p->column_slot + m);
    p->hn_before = p->not_hp_before + m;

    memset(p->slots, 0, slots * sizeof(slot));
    for (int64_t r = 0; r < n; r++) {
        uint64_t key = key_of(p->noisy[n - 1 - r]);
        p->row_slot[r] = find_slot(p, key);
        p->row_slot[r]->key = key;
    }
    for (int64_t c = 0; c < m; c++) p->column_slot[c] = find_slot(p, key_of(p->clean[m - 1 - c]));
    memset(p->not_hp_before, 0, 2 * m); /* both: along the edge the table grows by one per column */
    return 0;
}

static void fill(const pair *p)
{
    const int64_t n = p->n, m = p->m;
    uint8_t *not_hp_before = p->not_hp_before, *hn_before = p->hn_before;
    for (int64_t first = 0; first < n; first += 128) {
        int64_t end = first + 128 < n ? first + 128 : n;
        word *words = p->words + first / 64 * m;
        uint64_t vp[2] = {-1, -1}, vn[2] = {0, 0}; /* the other edge */
        for (int64_t r = first; r < end; r++) p->row_slot[r]->rows[r / 64 % 2] |= (uint64_t)1 << r % 64;
        for (int64_t c = 0; c < m; c++) {
            uint64_t not_hp_in = not_hp_before[c], hn_in = hn_before[c];
#pragma GCC unroll 2
            for (int k = 0; k < 2; k++) {
                uint64_t eq = p->column_slot[c]->rows[k] | hn_in;
                uint64_t d0 = (((eq & vp[k]) + vp[k]) ^ vp[k]) | eq | vn[k];
                uint64_t not_hp = (d0 | vp[k]) & ~vn[k], hn = d0 & vp[k];
                uint64_t not_hp_out = not_hp >> 63, hn_out = hn >> 63;
                not_hp = not_hp << 1 | not_hp_in, hn = hn << 1 | hn_in; /* now of the row before */
                vp[k] = (not_hp & ~d0) | hn, vn[k] = d0 & ~not_hp;
                words[2 * c + k] = (word){d0, vp[k]};
                not_hp_in = not_hp_out, hn_in = hn_out;
            }
            not_hp_before[c] = not_hp_in, hn_before[c] = hn_in;
        }
        for (int64_t r = first; r < end; r++) p->row_slot[r]->rows[r / 64 % 2] = 0;
    }
}

/* Writes the script and returns its length. Behind the pair at work stands the common suffix. */
static int64_t trace(const pair *p, int64_t suffix, uint8_t *script)
{
    int64_t i = 0, j = 0, k = 0, n = p->n + suffix, m = p->m + suffix;
    while (i < p->n && j < p->m) {
        int op = KEEP;
        if (p->noisy[i] != p->clean[j]) {
            int64_t r = p->n - 1 - i, c = p->m - 1 - j;
            word w = p->words[(r / 128 * p->m + c) * 2 + r / 64 % 2];
            op = w.d0 >> r % 64 & 1 ? INS - (w.vp >> r % 64 & 1) : SUB;
        }
        script[k++] = op, i += op != INS, j += op != DEL;
    }
    while (n - i != m - j) {
        int op = n - i < m - j ? INS : DEL;
        if (i < n && j < m && p->noisy[i] == p->clean[j]) op = KEEP;
        script[k++] = op, i += op != INS, j += op != DEL;
    }
    memset(script + k, KEEP, n - i);
    return k + n - i;
}

/* The scripts of all pairs. Sequences lie end to end, between their fences, and so will the scripts; `script` has room
   for as many columns as there are tokens. Returns -1 when out of memory. */
int edit_scripts(int64_t pairs, const int32_t *noisy, const int64_t *noisy_fence, const int32_t *clean,
                 const int64_t *clean_fence, uint8_t *script, int64_t *script_fence)
{
    pair p = {0};
    int failed = 0;
    uint8_t *out = script;
    script_fence[0] = 0;
    for (int64_t b = 0; b < pairs; b++) {
        int64_t suffix = 0;
        p.noisy = noisy + noisy_fence[b], p.n = noisy_fence[b + 1] - noisy_fence[b];
        p.clean = clean + clean_fence[b], p.m = clean_fence[b + 1] - clean_fence[b];
        while (p.n && p.m && *p.noisy == *p.clean) *out++ = KEEP, p.noisy++, p.clean++, p.n--, p.m--;
        while (p.n && p.m && p.noisy[p.n - 1] == p.clean[p.m - 1]) suffix++, p.n--, p.m--;
        if (p.n && p.m) {
            if ((failed = set_up(&p))) break;
            fill(&p);
        }
        out += trace(&p, suffix, out);
        script_fence[b + 1] = out - script;
    }
    free(p.memory);
    return failed;
}

/* The labels of all pairs, read off their scripts; edit_distance.py says what they mean. Labels lie end to end: as many
   of the first kind as `noisy` has tokens, and one more per pair of the second. */
void edit_labels(int64_t pairs, const int32_t *clean, const int64_t *clean_fence, const uint8_t *script,
                 const int64_t *script_fence, int64_t del_id, int64_t eos_id, int64_t ignore_id,
                 int64_t *token_target, int64_t *insert_target)
{
    for (int64_t b = 0; b < pairs; b++) {
        const int32_t *right = clean + clean_fence[b], *end = clean + clean_fence[b + 1]; /* right: what comes next */
        *insert_target++ = right < end ? *right : eos_id;
        for (int64_t k = script_fence[b]; k < script_fence[b + 1]; k++) {
            int deleted = script[k] == DEL;
            right += !deleted;
            if (script[k] == INS) continue;
            *token_target++ = deleted ? del_id : right[-1];
            *insert_target++ = deleted ? ignore_id : right < end ? *right : eos_id;
        }
    }
}
