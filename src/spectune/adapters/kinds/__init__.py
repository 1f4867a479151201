"""The kinds of adapters: how each one changes a weight, one module per kind.

| module | change of a weight W |
| --- | --- |
| change | what the kinds share: the interface, the record of a kind, shapes |
| pair | LoRA, LoCon: B A |
| loha | LoHa: (B1 A1) * (B2 A2), elementwise |
| lokr | LoKr: the Kronecker product of two matrices |
| difference | a difference of the complete weight |
| dora | DoRA: any of the above, with given norms of the rows or columns |
| oft | OFT: blocks of rows are rotated |
| boft | BOFT: a product of several rotations of blocks |
| glora | GLoRA: W A + B, both of low rank |
| ia3 | (IA)^3: rows or columns are scaled |
| table | all kinds, and which suffixes identify them |
"""
