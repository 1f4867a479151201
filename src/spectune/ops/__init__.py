"""Operations on whole files. Each operation is one module."""
